"""The index of a set of tar shards: where every member of every sample lies, in arrays, remembered in a file."""

import hashlib
import io
import json
import os
import zipfile
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sprint.base.door import held_against, parse_json, regular_file
from sprint.base.errors import SprintError
from sprint.base.files import sweep, write_whole
from sprint.data.arrays import BAD_ARRAY, npz_member
from sprint.data.beside import owner_of
from sprint.data.items import said
from sprint.data.tar.entries import (
    HOSTILE,
    REPEATED,
    Entry,
    File,
    json_values,
    tar_entries,
)

FORMAT = 2  # of the remembered index; an index of another number is made anew
MOST_SUFFIXES = 1000  # in one shard
SCANNERS = 8  # threads, which overlap the waiting for slow disks

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


class Skipped(NamedTuple):
    """An entry that was passed over: the words of a `BadSample`."""

    where: str
    reason: str
    detail: str


class About(NamedTuple):
    """What an index holds beside its arrays."""

    files: list[str]
    suffixes: list[str]
    skipped: list[Skipped]


@dataclass(frozen=True)
class TarIndex:
    """Where every member of every sample lies.

    files               shards and sidecars, relative to their folder
    suffixes            the different ones
    shard [N]           number of the sample's file
    first [N + 1]       sample i has members first[i] : first[i + 1]
    keys, key_ends [N + 1]   UTF-8 of all KEYs, and where each ends
    suffix, file_number, offset, size [M]   of each member
    """

    files: list[str]
    suffixes: list[str]
    skipped: list[Skipped]
    shard: np.ndarray
    first: np.ndarray
    keys: np.ndarray
    key_ends: np.ndarray
    suffix: np.ndarray
    file_number: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    ARRAYS = ("shard", "first", "keys", "key_ends", "suffix", "file_number", "offset", "size")

    @property
    def _about(self) -> bytes:
        return json.dumps(About(self.files, self.suffixes, self.skipped)._asdict()).encode()

    def digest(self) -> str:
        """SHA-256 of all that it holds."""
        digest = hashlib.sha256(self._about)
        for name in self.ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name)))
        return digest.hexdigest()

    def to_bytes(self, fingerprint: str) -> bytes:
        words = {"fingerprint": fingerprint.encode(), "about": self._about}
        arrays = {name: np.frombuffer(word, np.uint8) for name, word in words.items()}
        stream = io.BytesIO()
        np.savez(stream, **arrays, **{name: getattr(self, name) for name in self.ARRAYS})
        return stream.getvalue()

    @classmethod
    def from_file(
        cls, file: Path, fingerprint: str, files: list[str], sizes: Sequence[int]
    ) -> "TarIndex | None":
        """None if it is missing, damaged, or of other shards than `files`: it may lie where others can write.

        sizes   of the files, in bytes
        """
        try:
            largest = regular_file(file).stat().st_size  # it is not compressed
            with zipfile.ZipFile(file) as archive:
                if npz_member(archive, "fingerprint", largest).tobytes() != fingerprint.encode():
                    return None
                about = parse_json(npz_member(archive, "about", largest).tobytes(), file)
                arrays = {name: npz_member(archive, name, largest) for name in cls.ARRAYS}
            index = cls(**held_against(About, about, file)._asdict(), **arrays)
            return index if index.files == files and index._is_sound(np.array(sizes)) else None
        except (SprintError, *BAD_ARRAY):
            return None

    def _is_sound(self, sizes: np.ndarray) -> bool:
        """Whether lengths agree, every number points into what it counts in, and every KEY is text."""
        if any(x.ndim != 1 or x.dtype.kind not in "iu" for x in map(partial(getattr, self), self.ARRAYS)):
            return False
        samples, members = len(self.shard), len(self.suffix)
        return (
            len(self.first) == len(self.key_ends) == samples + 1
            and len(self.file_number) == len(self.offset) == len(self.size) == members
            and self.keys.dtype == np.uint8
            and _divides(self.first, members)
            and bool((self.first[1:] > self.first[:-1]).all())
            and _divides(self.key_ends, self.keys.nbytes)
            and _within(self.shard, len(self.files))
            and _within(self.file_number, len(self.files))
            and _within(self.suffix, len(self.suffixes))
            and _fit(self.offset, self.size, sizes[self.file_number])
            and _are_text(self.keys, self.key_ends)
        )


def _divides(ends: np.ndarray, total: int) -> bool:
    """Whether ends[i] : ends[i + 1] are parts of `total` things, in order and without a gap."""
    return bool(ends[0] == 0 and ends[-1] == total and (ends[1:] >= ends[:-1]).all())


def _within(numbers: np.ndarray, count: int) -> bool:
    return bool(((numbers >= 0) & (numbers < count)).all())


def _fit(offset: np.ndarray, size: np.ndarray, whole: np.ndarray) -> bool:
    """Whether bytes offset : offset + size are there, without a sum that could overflow."""
    return (
        _within(offset, 2**62)
        and _within(size, 2**62)
        and bool((size <= whole - offset.astype(np.int64)).all())
    )


def _are_text(keys: np.ndarray, ends: np.ndarray) -> bool:
    """Whether every KEY is UTF-8: all together, and none begins within a character."""
    try:
        keys.tobytes().decode()
    except UnicodeDecodeError:
        return False
    starts = ends[:-1][ends[:-1] < len(keys)]
    return bool(((keys[starts] & 0xC0) != 0x80).all())


def remembered_index(root: Path, groups: list[list[str]], path: str) -> TarIndex:
    """The index of these files, which is made unless one is remembered for their names, sizes and times.

    groups   each shard, relative to `root`, followed by its sidecars
    path     as the user wrote it: what the index is remembered under

    It is kept beside the shards, or else in the user's cache. Several processes may do this at once.
    """
    files = [name for group in groups for name in group]
    try:
        states = [(s.st_size, s.st_mtime_ns) for s in map(os.stat, (root / name for name in files))]
    except OSError as error:
        raise SprintError(f"{error.filename}: cannot be read: {error.strerror}") from error
    fingerprint = _digest([FORMAT, files, states])
    pattern = os.path.relpath(os.path.abspath(path), root), any(len(group) > 1 for group in groups)
    places = [root / f".sprint-{_digest(pattern)[:12]}.npz"]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):  # else there is no home
        places.append(Path(cache, "sprint", "shards", f"{_digest([str(root.resolve()), pattern])}.npz"))
    for place in places:
        if index := TarIndex.from_file(place, fingerprint, files, [size for size, _ in states]):
            return index
    with ThreadPoolExecutor(SCANNERS, thread_name_prefix="scan") as pool:
        index = _joined(list(pool.map(lambda group: _scan(root, group), groups)))
    content = index.to_bytes(fingerprint)
    for place in places if len(index.shard) else ():
        sweep(place.parent)
        try:
            write_whole(place, content)
        except OSError:
            continue  # a folder of shards is often not ours to write to
        break
    return index


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _scan(root: Path, group: list[str]) -> TarIndex:
    """The index of one shard and its sidecars. Raises `SprintError` if it cannot be read at all."""
    keys: dict[str, int] = {}
    suffixes: dict[str, int] = {}
    rows, skipped = array("q"), []

    def skip(place: str, reason: str, detail: str) -> None:
        skipped.append(Skipped(f"{name}: {place}" if place else name, reason, detail))

    def add(key: str, suffix: str, entry: Entry) -> None:
        if suffix not in suffixes and len(suffixes) >= MOST_SUFFIXES:
            return skip(entry.name, HOSTILE, f"more than {MOST_SUFFIXES} suffixes")
        numbers = keys.setdefault(key, len(keys)), suffixes.setdefault(suffix, len(suffixes))
        rows.extend((*numbers, number, entry.offset, entry.size))

    for number, name in enumerate(group):
        try:
            file = File(root / name)
            if number == 0:
                if file.read(0, 8).startswith(_COMPRESSED):
                    raise SprintError(
                        f"{root / name}: compressed; unpack it: only plain tars are read at random"
                    )
                for entry in tar_entries(file, skip):
                    if parts := key_and_suffix(entry.name):
                        add(*parts, entry)
            else:
                suffix = f"/{name.removeprefix(os.path.splitext(group[0])[0])}"
                for entry in json_values(file, skip):
                    if entry.name in keys:
                        add(entry.name, suffix, entry)
        except OSError as error:
            raise SprintError(f"{root / name}: cannot be read: {said(error)}") from error
    table = np.array(rows, np.int64).reshape(-1, 5)
    names = _adopt(keys, suffixes, table)
    return _index_of_rows(group, names, list(suffixes), table, skipped)


def _adopt(keys: dict[str, int], suffixes: dict[str, int], rows: np.ndarray) -> list[str]:
    """KEY_ANY.json, a sample of its own by its name, becomes member "_ANY.json" of the sample KEY, in place.

    -> the KEYs that are left, in the order in which `rows` number them now
    """
    is_json = np.array([suffix.endswith("json") for suffix in suffixes], bool)
    lonely = np.ones(len(keys), bool)
    lonely[rows[~is_json[rows[:, 1]], 0]] = False
    names, endings = list(keys), list(suffixes)
    owners = {name: number for name, number in keys.items() if not lonely[number]}
    for row in np.flatnonzero(lonely[rows[:, 0]]) if owners else ():
        name, ending = names[rows[row, 0]], endings[rows[row, 1]]
        owner = owner_of(name, owners)
        if owner is None or ending[0] == "/":
            continue
        suffix = f"{name[len(owner) :]}.{ending}"
        if suffix in suffixes or len(suffixes) < MOST_SUFFIXES:
            rows[row, :2] = owners[owner], suffixes.setdefault(suffix, len(suffixes))
    left, rows[:, 0] = np.unique(rows[:, 0], return_inverse=True)
    return [names[number] for number in left]


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """a/b.seg.PNG -> "a/b", "seg.png"; None without a base name or without a suffix."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and suffix else None


def _index_of_rows(
    group: list[str], keys: list[str], suffixes: list[str], rows: np.ndarray, skipped: list[Skipped]
) -> TarIndex:
    """rows [M, 5]: number of the key, of the suffix and of the file, offset, size; in the order of the shard"""
    _, kept = np.unique(rows[:, 0] * MOST_SUFFIXES + rows[:, 1], return_index=True)
    for row in np.setdiff1d(np.arange(len(rows)), kept):
        key, suffix, file, offset, _ = rows[row].tolist()
        place = f"{group[file]}: byte {offset}, {keys[key]}.{suffixes[suffix]}"
        skipped.append(Skipped(place, REPEATED, "there twice; the first is taken"))
    key, suffix, file, offset, size = rows[kept].T
    encoded = [word.encode() for word in keys]
    return TarIndex(
        files=group,
        suffixes=suffixes,
        skipped=skipped,
        shard=np.zeros(len(keys), np.uint32),
        first=np.searchsorted(key, np.arange(len(keys) + 1)),
        keys=np.frombuffer(b"".join(encoded), np.uint8),
        key_ends=np.cumsum([0, *map(len, encoded)]),
        suffix=suffix.astype(np.uint32),
        file_number=file.astype(np.uint32),
        offset=offset,
        size=size,
    )


def _joined(parts: list[TarIndex]) -> TarIndex:
    numbers: dict[str, int] = {}
    for suffix in (suffix for part in parts for suffix in part.suffixes):
        numbers.setdefault(suffix, len(numbers))
    suffix = [np.array([numbers[s] for s in part.suffixes], np.uint32)[part.suffix] for part in parts]
    starts = np.cumsum([0, *(len(part.files) for part in parts[:-1])]).astype(np.uint32)

    def renumber(name: str) -> np.ndarray:
        return np.concatenate(
            [getattr(part, name) + start for part, start in zip(parts, starts, strict=True)]
        )

    def ends(name: str) -> np.ndarray:
        counts = [np.diff(getattr(part, name)) for part in parts]
        return np.cumsum(np.concatenate([[0], *counts]), dtype=np.int64)

    def end_to_end(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    return TarIndex(
        files=[name for part in parts for name in part.files],
        suffixes=list(numbers),
        skipped=[words for part in parts for words in part.skipped],
        shard=renumber("shard"),
        first=ends("first"),
        keys=end_to_end("keys"),
        key_ends=ends("key_ends"),
        suffix=np.concatenate(suffix),
        file_number=renumber("file_number"),
        offset=end_to_end("offset"),
        size=end_to_end("size"),
    )
