"""One error for whatever keeps a file of the hub away."""

import pytest
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from sprint.base.errors import SprintError
from sprint.weights.hub import HubError, NoSuchFile, fetch_file, fetch_folder, folder_here
from sprint.weights.settings import Settings, read_settings


def failing(error):
    def ask(*args, **kwargs):
        raise error

    return ask


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (EntryNotFoundError("no such entry"), NoSuchFile),
        (LocalEntryNotFoundError("no such entry"), NoSuchFile),
        (OSError("no such entry"), HubError),
        (HFValidationError("no such entry"), HubError),
    ],
)
def test_its_message_is_the_first_line_of_the_reason(monkeypatch, error, kind):
    error.args = ("no such entry\nand how to log in",)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(error))
    monkeypatch.setattr("huggingface_hub.snapshot_download", failing(error))
    for ask in (lambda: fetch_file("some/where", "x.json"), lambda: fetch_folder("some/where", ["*.json"])):
        with pytest.raises(SprintError, match=r"^no such entry$") as raised:
            ask()
        assert type(raised.value) is kind


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
