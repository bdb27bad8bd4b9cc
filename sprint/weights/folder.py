"""Folders that are whole or not there."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sprint.base.errors import SprintError
from sprint.base.files import flush_folder, flush_tree

INDEX_FILE = "model_index.json"


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder` to write into; at the end it takes the place of an earlier export.

    After an error, or Ctrl-C, `folder` is as it was. Raises SprintError for OSErrors on the way, and where
    `folder` holds anything but an earlier export.
    """
    folder = folder.absolute()
    if folder.exists() and not (folder / INDEX_FILE).is_file() and not _is_empty(folder):
        raise SprintError(f"{folder} holds something that is no exported model; give another folder")
    fresh, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed
    try:
        fresh.mkdir(parents=True)
        yield fresh
        flush_tree(fresh)
        _swap(fresh, folder, old)
        flush_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise SprintError(f"cannot write {folder}: {reason}; it is as it was") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap(fresh: Path, folder: Path, old: Path) -> None:
    """`fresh` becomes `folder`; if that fails, what was there comes back."""
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    try:
        os.replace(fresh, folder)
    except BaseException:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
