"""Folders that are whole or not there."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sprint.base.door import read_json
from sprint.base.errors import SprintError
from sprint.base.files import flush_tree, whole_or_absent

INDEX_FILE = "model_index.json"
RECIPE_FILE, STUDENT = "recipe.yaml", "student"  # in a run's folder


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


def pipeline_class(folder: Path) -> str:
    """`_class_name` of an exported folder. Raises SprintError where it says none."""
    kind = read_json(folder / INDEX_FILE).get("_class_name")
    if not isinstance(kind, str):
        raise SprintError(f"{folder / INDEX_FILE}: _class_name is no text")
    return kind


def student_of(name: str) -> str:
    """The student of a run's folder; what is no run's folder stays as it is.

    Raises SprintError for a run that has no student yet.
    """
    try:
        if not (Path(name) / RECIPE_FILE).is_file() or (Path(name) / INDEX_FILE).exists():
            return name
        finished = is_export(Path(name) / STUDENT)
    except (OSError, ValueError):  # no name that a file could have
        return name
    if not finished:
        raise SprintError(f"{name}: a run that has no student yet; `sprint distill` it to the end")
    return str(Path(name) / STUDENT)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
