"""One error for whatever keeps a file of the hub away."""

import errno
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from sprint.base.errors import SprintError
from sprint.weights.hub import HubError, NoSuchFile, fetch_file, fetch_folder, folder_here
from sprint.weights.settings import Settings, read_settings


def failing(error):
    def ask(*args, **kwargs):
        raise error

    return ask


def answer(kind: type, status: int) -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("the hub's own words\nand more", response=response)


def because(cause: Exception) -> Exception:
    """As snapshot_download does where the hub cannot tell what there is."""
    error = LocalEntryNotFoundError("not on disk")
    error.__cause__ = cause
    return error


GATED = (
    "some/where is gated: read and accept its terms at https://huggingface.co/some/where, then log in here"
)
REASONS = [
    (answer(GatedRepoError, 401), HubError, GATED),
    (answer(GatedRepoError, 403), HubError, GATED),
    (
        answer(RepositoryNotFoundError, 401),
        HubError,
        "there is no https://huggingface.co/some/where, or it is private",
    ),
    (
        answer(HfHubHTTPError, 403),
        HubError,
        "there is no https://huggingface.co/some/where, or it is private",
    ),
    (answer(DisabledRepoError, 403), HubError, "some/where was disabled by the hub"),
    (answer(HfHubHTTPError, 429), HubError, "the hub answers too many requests from here"),
    (because(answer(HfHubHTTPError, 503)), NoSuchFile, "the hub answers with error 503: try again later"),
    (answer(RemoteEntryNotFoundError, 404), NoSuchFile, "the hub's own words$"),
    (
        LocalEntryNotFoundError("long\nwords"),
        NoSuchFile,
        "the hub cannot be reached from here.*hf download some/where",
    ),
    (
        OfflineModeIsEnabled("long\nwords"),
        HubError,
        "the hub cannot be reached from here.*hf download some/where",
    ),
    (OSError(errno.ENOSPC, "No space left on device"), HubError, "no space left for it in .*set HF_HOME"),
    (PermissionError(errno.EACCES, "Permission denied"), HubError, "cannot be written: set HF_HOME"),
    (OSError("no route\nto it"), HubError, "no route$"),
    (HTTPError("connection reset\nby peer"), HubError, "connection reset$"),
    (HFValidationError("bad name\nand why"), HubError, "bad name$"),
]


@pytest.mark.parametrize(("error", "kind", "words"), REASONS)
def test_every_reason_is_one_line_with_what_to_do(monkeypatch, error, kind, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(error))
    monkeypatch.setattr("huggingface_hub.snapshot_download", failing(error))
    for ask in (lambda: fetch_file("some/where", "x.json"), lambda: fetch_folder("some/where", ["*.json"])):
        with pytest.raises(SprintError, match=words) as raised:
            ask()
        assert type(raised.value) is kind and "\n" not in str(raised.value)


def test_offline_is_said_and_datasets_have_their_own_page(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(LocalEntryNotFoundError("words")))
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set.*hf download some/where --repo-type dataset"):
        fetch_file("some/where", "x.json", repo_type="dataset")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(answer(GatedRepoError, 401)))
    with pytest.raises(HubError, match=r"terms at https://huggingface.co/datasets/some/where"):
        fetch_file("some/where", "x.json", repo_type="dataset")


def test_a_mistake_of_ours_is_no_error_of_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(TypeError("unexpected keyword")))
    with pytest.raises(TypeError):
        fetch_file("some/where", "x.json")


def test_a_model_without_settings_has_the_usual_ones_and_a_hub_that_fails_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(LocalEntryNotFoundError("offline")))
    assert read_settings("some/where") == Settings()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(OSError("no route")))
    with pytest.raises(SprintError, match=r"^some/where: the hub did not answer for sprint.json: no route$"):
        read_settings("some/where")


def test_what_is_here_is_found_without_asking(tmp_path, monkeypatch):
    assert folder_here(str(tmp_path)) == tmp_path
    monkeypatch.setattr("huggingface_hub.snapshot_download", failing(LocalEntryNotFoundError("not cached")))
    assert folder_here("some/where") is None
