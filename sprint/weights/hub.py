"""What lies on the Hugging Face hub: fetched, or looked up in its cache, with one error for whatever prevents it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from sprint.base.errors import SprintError


class HubError(SprintError):
    """The first line of what the hub, or the way there, said: no network, no such name, no access."""


class NoSuchFile(HubError):
    """The file that was asked for is not there."""


def fetch_folder(repo_id: str, patterns: Sequence[str]) -> Path:
    """The files of a model that match, in the hub's cache. Raises HubError."""
    from huggingface_hub import snapshot_download

    return _asked(lambda: snapshot_download(repo_id, allow_patterns=list(patterns)))


def fetch_file(repo_id: str, name: str, repo_type: str | None = None) -> Path:
    """One file of a model, or of a dataset where repo_type is "dataset".

    Raises HubError; of its kinds NoSuchFile where the hub has no such file, or cannot be asked and the cache has none.
    """
    from huggingface_hub import hf_hub_download

    return _asked(lambda: hf_hub_download(repo_id, name, repo_type=repo_type))


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


def _asked(ask: Callable[[], str]) -> Path:
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(ask())
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        kind = NoSuchFile if isinstance(error, EntryNotFoundError) else HubError
        raise kind(str(error).strip().split("\n")[0]) from error
