"""Folders that are whole or not there."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sprint.base.errors import SprintError
from sprint.base.files import flush_tree, whole_or_absent

INDEX_FILE = "model_index.json"


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder` to write into; at the end it takes the place of an earlier export.

    After an error, or Ctrl-C, `folder` is as it was. Raises SprintError for OSErrors on the way, and where
    `folder` holds anything but an earlier export.
    """
    folder = folder.absolute()
    is_export(folder)
    try:
        with whole_or_absent(folder, folder.with_name(f".{folder.name}.part")) as place:
            place.mkdir()
            yield place
            flush_tree(place)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise SprintError(f"cannot write {folder}: {reason}; it is as it was") from error


def is_export(folder: Path) -> bool:
    """Whether an export is there; an empty folder is none. Raises SprintError where there is something else."""
    if (folder / INDEX_FILE).is_file():
        return True
    if folder.exists() and not _is_empty(folder):
        raise SprintError(
            f"{folder} holds something that is no exported model; give another folder, or delete it"
        )
    return False


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
