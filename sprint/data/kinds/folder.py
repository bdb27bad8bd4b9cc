"""A folder of captioned pictures: NAME.jpg, .jpeg, .png or .webp beside NAME.txt or NAME.json, at any depth."""

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sprint.base.errors import SprintError
from sprint.data.batch import Sample
from sprint.data.buckets import shapes_of
from sprint.data.captions import caption_from
from sprint.data.items import BadSample, Items, said
from sprint.data.pictures import SUFFIXES, Shape, picture_from, size_from
from sprint.recipe.schema import Data


class Pair(NamedTuple):
    """Paths; "" for what is not there."""

    picture: str
    caption: str


class FolderItems(Items):
    """Sorted by path: a folder that changes changes the samples.

    Construction reads names only; hidden files, and links to folders, are passed over. Raises `SprintError` for
    a missing or empty folder, and if more than data.bad_share have a picture or a caption without the other.
    """

    def __init__(self, data: Data):
        self._data, self._shapes = data, shapes_of(data)
        self._pairs = find_pairs(Path(data.path), data.bad_share)

    def __len__(self) -> int:
        return len(self._pairs)

    def item(self, index: int, draw: np.random.Generator) -> Sample:
        pair = self._whole(index)
        caption = caption_from(read_caption(pair.caption), pair.caption, self._data.caption_temperature, draw)
        return Sample(picture_from(pair.picture, self._shapes, pair.picture), caption)

    def size(self, index: int) -> Shape:
        pair = self._whole(index)
        return size_from(pair.picture, pair.picture)

    def where(self, index: int) -> str:
        pair = self._pairs[index]
        return pair.picture or pair.caption

    @cached_property
    def fingerprint(self) -> str:
        """Of the names, relative to the folder: what the files hold is not read."""
        digest, start = hashlib.sha256(), len(os.path.join(Path(self._data.path), ""))
        for name in (name for pair in self._pairs for name in pair):
            digest.update(os.fsencode(name[start:]) + b"\0")
        return digest.hexdigest()

    def _whole(self, index: int) -> Pair:
        pair = self._pairs[index]
        if not pair.caption:
            raise BadSample("missing caption", pair.picture)
        if not pair.picture:
            raise BadSample("missing picture", pair.caption)
        return pair


def find_pairs(folder: Path, bad_share: float = 0.0) -> list[Pair]:
    """Every picture and every .txt, sorted by path without suffix."""
    if not folder.is_dir():
        problem = "not a folder" if folder.exists() else "no such folder"
        raise SprintError(f"{folder}: {problem}; set data.path to a folder of pictures with captions")
    pictures, texts, objects = _scan(folder)
    if not pictures:
        raise SprintError(f"{folder}: no pictures there; expected NAME.jpg, .png or .webp beside NAME.txt")
    stems = sorted(pictures.keys() | texts.keys())
    pairs = [Pair(pictures.get(stem, ""), texts.get(stem) or objects.get(stem, "")) for stem in stems]
    _refuse_many(
        [pair.picture for pair in pairs if not pair.caption],
        len(pairs),
        bad_share,
        ("picture without caption", "write it in a .txt of that name"),
    )
    _refuse_many(
        [pair.caption for pair in pairs if not pair.picture],
        len(pairs),
        bad_share,
        ("caption without picture", "add the picture or remove it"),
    )
    return pairs


def _refuse_many(alone: list[str], total: int, bad_share: float, words: tuple[str, str]) -> None:
    if len(alone) > bad_share * total:
        problem, remedy = words
        counts = f"{len(alone)} of {total}, more than data.bad_share = {bad_share} allows"
        raise SprintError(f"{alone[0]}: {problem} ({counts}); {remedy}")


def _scan(folder: Path) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Pictures, .txt and .json by path without suffix."""
    pictures, texts, objects = {}, {}, {}
    kinds = {".txt": texts, ".json": objects, **dict.fromkeys(SUFFIXES, pictures)}
    for root, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(names):
            stem, suffix = os.path.splitext(os.path.join(root, name))
            found = kinds.get(suffix.lower())
            if found is None or name.startswith("."):
                continue
            if stem in found:
                raise SprintError(f"{stem}{suffix}: {found[stem]} has the same name; keep one of them")
            found[stem] = stem + suffix
    return pictures, texts, objects


def _refuse(error: OSError) -> None:
    raise SprintError(f"{error.filename}: cannot be read: {error.strerror}") from error


def read_caption(file: str) -> object:
    """What a UTF-8 .txt or .json file holds, as `caption_from` takes it. Raises `BadSample`."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        return json.loads(text) if file.lower().endswith(".json") else text
    except (OSError, ValueError, RecursionError) as error:
        raise BadSample("unreadable caption", file, said(error)) from error
