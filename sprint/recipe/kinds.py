"""Which kind of data a path looks like, by names alone."""

import os
import re
from itertools import islice
from pathlib import Path

from sprint.recipe.schema import DataKind

ARCHIVES = (
    ".tar",
    ".tar.gz",
    ".tgz",
    ".tar.zst",
    ".tar.xz",
    ".tar.bz2",
)  # those that are compressed are refused
LOOKED_AT = 10_000  # names
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PROMPTS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
# What says it of a folder: a name, or how a name ends.
_OF_FOLDERS = (
    (DataKind.cache, ("cache.json", "unfinished.json")),
    (DataKind.huggingface, ("dataset_dict.json", "state.json")),
    (DataKind.webdataset, ARCHIVES),
    (DataKind.huggingface, (".parquet", ".arrow")),
)


def kind_of(path: str) -> DataKind | None:
    """The kind that a data.path is most likely of; None where nothing is there, or nothing tells."""
    place, suffix = Path(path), os.path.splitext(path)[1].lower()
    try:
        if place.is_dir():
            return _kind_of_folder(place)
        if place.is_file():
            return DataKind.prompts if suffix in _PROMPTS else _kind_of_file(path)
        there = place.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return None
    if not there and _HUB.fullmatch(path) and suffix != ".tar" and not place.parent.exists():
        return DataKind.huggingface
    return _kind_of_file(path)


def _kind_of_file(path: str) -> DataKind | None:
    """Of a file that holds pictures. One that is read only with others, or unpacked, is of that kind all the same."""
    if path.lower().endswith(ARCHIVES):
        return DataKind.webdataset
    return DataKind.huggingface if path.lower().endswith((".parquet", ".arrow")) else None


def _kind_of_folder(folder: Path) -> DataKind:
    files = (name for _, _, names in os.walk(folder) for name in names)
    names = list(islice(files, LOOKED_AT))
    for kind, ends in _OF_FOLDERS:
        if any(name == end or (end[0] == "." and name.endswith(end)) for name in names for end in ends):
            return kind
    return DataKind.folder
