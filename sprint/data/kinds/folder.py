"""A folder of captioned pictures at any depth; what may stand beside one says `sprint.data.beside`.

Pictures that have nothing beside them get their captions from tables (`sprint.data.tables`) in any of the folders.
"""

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sprint.base.door import read_bytes, shown
from sprint.base.errors import SprintError
from sprint.data.batch import Sample
from sprint.data.beside import OWN, SCORE_FILES, TEXTS, caption_beside, owner_of
from sprint.data.buckets import shapes_of
from sprint.data.captions import caption_from
from sprint.data.items import BadSample, Items, said
from sprint.data.pictures import SUFFIXES, Shape, picture_from, size_from
from sprint.data.tables import captions_by_file, is_table
from sprint.data.walk import files_in, nothing_found
from sprint.recipe.schema import Data, DataKind

LARGEST_CAPTION = 2**24  # bytes


class Pair(NamedTuple):
    """stem      path of the picture without its suffix
    picture   its path; "" where there is none
    captions  paths of what stands beside it
    row       what a table says of it, as `caption_from` takes it
    """

    stem: str
    picture: str
    captions: tuple[str, ...] = ()
    row: object = None

    @property
    def captioned(self) -> bool:
        return self.row is not None or any(not file.endswith(SCORE_FILES) for file in self.captions)


class FolderItems(Items):
    """Sorted by path: a folder that changes changes the samples.

    Construction reads names and tables only; hidden files are passed over, links to folders followed (`files_in`).
    Raises `SprintError` for a missing or empty folder, and if more than data.bad_share have a picture or a caption
    without the other.
    """

    def __init__(self, data: Data):
        self._data, self._shapes = data, shapes_of(data)
        self._pairs = find_pairs(Path(data.path), data.bad_share)

    def __len__(self) -> int:
        return len(self._pairs)

    def item(self, index: int, draw: np.random.Generator) -> Sample:
        pair = self._whole(index)
        caption = read_caption(pair, self._data.caption_temperature, draw)
        return Sample(picture_from(pair.picture, self._shapes, pair.picture), caption)

    def picture(self, index: int) -> str:
        return self._whole(index).picture

    def size(self, index: int) -> Shape:
        return size_from(self.picture(index), self.where(index))

    def where(self, index: int) -> str:
        pair = self._pairs[index]
        return pair.picture or pair.captions[0]

    @cached_property
    def fingerprint(self) -> str:
        """Of the names, relative to the folder: what the files hold is not read."""
        digest, start = hashlib.sha256(), len(os.path.join(Path(self._data.path), ""))
        for name in (name for pair in self._pairs for name in (pair.picture, *(pair.captions or ("",)))):
            digest.update(os.fsencode(name[start:]) + b"\0")
        return digest.hexdigest()

    def _whole(self, index: int) -> Pair:
        pair = self._pairs[index]
        if not pair.captioned:
            raise BadSample("missing caption", pair.picture)
        if not pair.picture:
            raise BadSample("missing picture", pair.captions[0])
        return pair


def read_caption(pair: Pair, temperature: float, draw: np.random.Generator) -> str:
    """The caption of a picture, drawn where there are several. Raises `BadSample`."""
    if not pair.captions:
        return caption_from(pair.row, pair.picture, temperature, draw)
    content = {}
    for file in pair.captions:
        try:
            content[_suffix(file, pair.stem)] = read_bytes(file, LARGEST_CAPTION)
        except SprintError as error:
            raise BadSample("unreadable caption", file, said(error.__cause__ or error)) from error
    where = next((file for file in pair.captions if _suffix(file, pair.stem) in OWN), pair.captions[0])
    return caption_beside(content, os.path.basename(pair.stem), where, temperature, draw)


def _suffix(file: str, stem: str) -> str:
    """ "txt" of KEY.TXT, "_ANY.json" of KEY_ANY.json"""
    suffix = file[len(stem) :]
    return suffix[1:].lower() if suffix[0] == "." else suffix


# ---- finding ----------------------------------------------------------------------------------------


def find_pairs(folder: Path, bad_share: float = 0.0) -> list[Pair]:
    """Every picture, and every .txt and .caption without one, sorted by path without suffix. Raises SprintError."""
    data = Data(kind=DataKind.folder, path=str(folder))
    if not folder.is_dir():
        problem = "not a folder" if folder.exists() else "no such folder"
        raise SprintError(
            f"{folder}: {problem}; set data.path to a folder of pictures with captions{nothing_found(data)}"
        )
    found = _Found(folder)
    if not found.pictures:
        raise SprintError(
            f"{folder}: no pictures there; expected NAME{SUFFIXES[0]} or another of {', '.join(SUFFIXES)} "
            f"beside NAME.txt{nothing_found(data)}"
        )
    pairs = found.pairs()
    _refuse_many(
        [pair.picture for pair in pairs if not pair.captioned],
        len(pairs),
        bad_share,
        ("picture without caption", found.why_no_caption),
    )
    _refuse_many(
        [pair.captions[0] for pair in pairs if not pair.picture],
        len(pairs),
        bad_share,
        ("caption without picture", found.why_no_picture),
    )
    return pairs


def _refuse_many(alone: list[str], total: int, bad_share: float, words: tuple) -> None:
    if len(alone) > bad_share * total:
        problem, remedy = words
        counts = f"{len(alone)} of {total}, more than data.bad_share = {bad_share} allows"
        raise SprintError(f"{shown(alone[0], 1000)}: {problem} ({counts}); {remedy(alone[0])}")


class _Found:
    """The files of a folder, by their paths without suffix."""

    def __init__(self, folder: Path):
        self.pictures: dict[str, str] = {}
        self._beside: dict[str, dict[str, str]] = {suffix: {} for suffix in OWN}
        self._tables: list[str] = []
        self._others: dict[str, str] = {}
        for root, names in files_in(folder):
            for name in names:
                self._add(os.path.join(root, name), name)
        self._unread = list(self._tables)  # tables that say nothing of these pictures

    def _add(self, path: str, name: str) -> None:
        stem, suffix = os.path.splitext(path)
        found = self.pictures if suffix.lower() in SUFFIXES else self._beside.get(suffix[1:].lower())
        if is_table(name):
            self._tables.append(path)
        elif found is None:
            self._others[stem] = path
        elif stem in found:
            raise SprintError(f"{path}: {found[stem]} has the same name; keep one of them")
        if found is not None:
            found[stem] = path

    def pairs(self) -> list[Pair]:
        named: dict[str, list[str]] = {}
        for stem, file in self._beside["json"].items():
            owner = owner_of(stem, self.pictures)
            if owner not in (None, stem):
                named.setdefault(owner, []).append(file)
        tables = set(self._tables)
        alone = {
            stem for suffix in TEXTS for stem, file in self._beside[suffix].items() if file not in tables
        }
        pairs = []
        for stem in sorted(self.pictures.keys() | alone):
            own = [self._beside[suffix][stem] for suffix in OWN if stem in self._beside[suffix]]
            pairs.append(Pair(stem, self.pictures.get(stem, ""), (*own, *named.get(stem, ()))))
        if self._tables and not all(pair.captioned for pair in pairs):
            rows = self._rows()
            pairs = [pair if pair.captioned else pair._replace(row=rows.get(pair.stem)) for pair in pairs]
        return pairs

    def _rows(self) -> dict[str, object]:
        """What the tables say, by the picture's path without suffix; the first of several tables is taken."""
        rows: dict[str, object] = {}
        by_path = {path: stem for stem, path in self.pictures.items()}
        by_name: dict[str, str] = {}
        for stem, path in self.pictures.items():
            for name in (os.path.basename(path), os.path.basename(stem)):
                by_name[name] = stem if by_name.get(name, stem) == stem else ""
        for table in self._tables:
            for file, value in captions_by_file(table).items():
                file = file.replace("\\", "/")
                path = os.path.normpath(os.path.join(os.path.dirname(table), file))
                stem = by_path.get(path) or (path if path in self.pictures else "")
                stem = stem or by_name.get(os.path.basename(file), "")
                if stem:
                    rows.setdefault(stem, value)
                    self._unread = [other for other in self._unread if other != table]
        return rows

    def why_no_caption(self, picture: str) -> str:
        if not os.path.exists(picture):
            return "it is a link to nothing"
        if os.path.exists(f"{picture}.txt"):
            name = os.path.basename(picture)
            return f"{shown(name)}.txt is there; name it {shown(os.path.splitext(name)[0])}.txt"
        for table in self._unread:
            return f"{shown(table)} does not name it in a column file_name with its caption in a column text"
        return "write it in a .txt of that name" + self._elsewhere(picture, TEXTS)

    def why_no_picture(self, caption: str) -> str:
        other = self._others.get(os.path.splitext(caption)[0])
        if other:
            return (
                f"{shown(os.path.basename(other))} is of no format that is read; convert it to .png or .jpg"
            )
        return "add the picture or remove it" + self._elsewhere(caption, ())

    def _elsewhere(self, file: str, suffixes: tuple[str, ...]) -> str:
        """Where a file of that name lies that would be the other half of the pair."""
        name = os.path.splitext(os.path.basename(file))[0]
        for other in self._all(suffixes):
            if os.path.splitext(os.path.basename(other))[0] == name:
                return f"; or is it {shown(other)}? They must lie in one folder"
        return ""

    def _all(self, suffixes: tuple[str, ...]) -> Iterator[str]:
        if not suffixes:
            yield from self.pictures.values()
        for suffix in suffixes:
            yield from self._beside[suffix].values()
