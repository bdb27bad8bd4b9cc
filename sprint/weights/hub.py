"""What lies on the Hugging Face hub: fetched, or looked up in its cache, with one error for whatever prevents it."""

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

from sprint.base.door import shown
from sprint.base.errors import SprintError

LOG_IN = "log in here (hf auth login, or HF_TOKEN=…) with a token"
MOST_SAID = 300  # characters of what the hub says itself


class HubError(SprintError):
    """The first line of what the hub, or the way there, said: no network, no such name, no access."""


class NoSuchFile(HubError):
    """The file that was asked for is not there."""


def fetch_folder(repo_id: str, patterns: Sequence[str]) -> Path:
    """The files of a model that match, in the hub's cache. Raises HubError."""
    from huggingface_hub import snapshot_download

    return _asked(lambda: snapshot_download(repo_id, allow_patterns=list(patterns)), repo_id)


def fetch_file(repo_id: str, name: str, repo_type: str | None = None) -> Path:
    """One file of a model, or of a dataset where repo_type is "dataset".

    Raises HubError; of its kinds NoSuchFile where the hub has no such file, or cannot be asked and the cache has none.
    """
    from huggingface_hub import hf_hub_download

    kind = "datasets/" if repo_type == "dataset" else ""
    return _asked(lambda: hf_hub_download(repo_id, name, repo_type=repo_type), f"{kind}{repo_id}")


def folder_here(name: str) -> Path | None:
    """A folder of that name, or where the cache has what was fetched under that hub id. Asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _asked(ask: Callable[[], str], where: str) -> Path:
    """where   what follows https://huggingface.co/"""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, HTTPError

    try:
        return Path(ask())
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        kind = NoSuchFile if isinstance(error, EntryNotFoundError) else HubError
        raise kind(_reason(error, where)) from error


def _reason(error: Exception, where: str) -> str:
    """One line: what keeps it away, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    page, repo_id = f"https://huggingface.co/{where}", where.removeprefix("datasets/")
    answers = [getattr(one, "response", None) for one in (error, error.__cause__)]
    status = next((answer.status_code for answer in answers if answer is not None), None)
    dataset = " --repo-type dataset" if where != repo_id else ""
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: read and accept its terms at {page}, then {LOG_IN} of that account"
    if isinstance(error, DisabledRepoError):
        return f"{repo_id} was disabled by the hub; see {page}"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return f"there is no {page}, or it is private: check the name, or {LOG_IN} of an account that may read it"
    if status == 429:
        return f"the hub answers too many requests from here: wait some minutes, or {LOG_IN}"
    if status is not None and status >= 500:
        return f"the hub answers with error {status}: try again later"
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached from here"
        fetch = f"run hf download {repo_id}{dataset} where there is a network, and bring that folder"
        return f"{why}, and it is not in {constants.HF_HUB_CACHE}: {fetch}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left for it in {constants.HF_HUB_CACHE}: free some, or set HF_HOME to a larger disk"
    if isinstance(error, PermissionError):
        return f"{constants.HF_HUB_CACHE} cannot be written: set HF_HOME to a folder that can"
    return shown(str(error).strip().split("\n")[0], MOST_SAID)
