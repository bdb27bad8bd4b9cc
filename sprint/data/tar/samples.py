"""Random access into the samples of uncompressed tar shards, without extracting them.

Headers are read once. What they say is kept in arrays and remembered in a file, so that the next start is
instant; a sample at any position then costs one read.
"""

import os
import re
from collections.abc import Collection, Iterable
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from sprint.base.errors import SprintError
from sprint.data.beside import owner_of
from sprint.data.items import BadSample, Items, said
from sprint.data.tar.entries import DAMAGED, HOSTILE, File
from sprint.data.tar.index import Skipped, remembered_index
from sprint.data.walk import files_in, what_is_in

LARGEST_MEMBER = 2**28  # bytes; what is larger is never read into memory
NEAR = 2**18  # bytes between two members that are still worth one read
OPEN_FILES = 64

MOST_SHARDS = 10**6
_COMPRESSED_NAMES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class TarSamples:
    """The samples of a set of shards: members of one shard that share a KEY, in order of shard and entry.

    The KEY is an entry's path up to the first dot of its base name, the rest is its suffix, here in lower case
    (WebDataset's rule): a/b.seg.PNG is member "seg.png" of sample "a/b". Entries without either are ignored.

    path       a folder (every .tar in it, at any depth, sorted), one .tar, or a pattern such as
               shards-{000..015}.tar or {train,more}/0.tar
    sidecars   also take SHARD.json and SHARD_ANY.json beside SHARD.tar, which hold {KEY: value}: the value is
               member "/.json" or "/_ANY.json" of sample KEY
    skipped    what was passed over while the headers were read

    Raises `SprintError` for shards that are missing, compressed or unreadable, and where no sample is found.
    Safe to use from several threads.
    """

    def __init__(self, path: str | Path, sidecars: bool = False):
        self.root, names = find_shards(str(path))
        root, groups = self.root, _with_sidecars(self.root, names, sidecars)
        self._index = index = remembered_index(root, groups, str(path))
        self._open = lru_cache(maxsize=OPEN_FILES)(lambda file: File(root / index.files[file]))
        self.skipped: list[Skipped] = index.skipped
        if not len(self):
            first = f"; {self.skipped[0].where}: {self.skipped[0].detail}" if self.skipped else ""
            raise SprintError(
                f"{path}: no samples in {len(names)} shards{first}; expected entries KEY.suffix"
            )

    def __len__(self) -> int:
        return len(self._index.shard)

    def key(self, sample: int) -> str:
        start, stop = self._index.key_ends[sample : sample + 2]
        return self._index.keys[start:stop].tobytes().decode()

    def shard(self, sample: int) -> Path:
        return self.root / self._index.files[self._index.shard[sample]]

    def where(self, sample: int) -> str:
        """Shard and KEY, for messages."""
        return f"{self._index.files[self._index.shard[sample]]}: {self.key(sample)}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, KEYs and places: of the headers, not of what the members hold."""
        return self._index.digest()

    def suffixes(self, sample: int) -> list[str]:
        return [self._index.suffixes[k] for k in self._index.suffix[list(self._members(sample))]]

    @property
    def all_suffixes(self) -> list[str]:
        """Of all samples together."""
        return self._index.suffixes

    def having(self, suffixes: Collection[str]) -> np.ndarray:
        """Which samples have a member of one of these suffixes.  -> bool [samples]"""
        wanted = np.array([suffix in suffixes for suffix in self._index.suffixes], bool)
        return np.logical_or.reduceat(wanted[self._index.suffix], self._index.first[:-1])

    def read(self, sample: int, suffixes: Collection[str], most: int = LARGEST_MEMBER) -> dict[str, bytes]:
        """The members of these suffixes that the sample has; those that lie together come in one read.

        most   bytes of one member, from its start

        Raises `BadSample` for a member that is too large, and where the shard is not any more what it was.
        """
        index, places = self._index, []
        for member in self._members(sample):
            suffix, size = index.suffixes[index.suffix[member]], int(index.size[member])
            if suffix not in suffixes:
                continue
            if size > LARGEST_MEMBER:
                raise BadSample(HOSTILE, self.where(sample), f"its {suffix} has {size} bytes")
            file, offset = int(index.file_number[member]), int(index.offset[member])
            places.append((file, offset, min(size, most), suffix))
        contents: dict[str, bytes] = {}
        for run in _runs(sorted(places)):
            contents.update(self._read(sample, run))
        return contents

    def _members(self, sample: int) -> range:
        return range(*self._index.first[sample : sample + 2].tolist())

    def _read(self, sample: int, run: list[tuple[int, int, int, str]]) -> Iterable[tuple[str, bytes]]:
        file, start, _, _ = run[0]
        length = max(offset + size for _, offset, size, _ in run) - start
        try:
            content = self._open(file).read(start, length)
        except OSError as error:
            raise BadSample(DAMAGED, self.where(sample), said(error)) from error
        if len(content) < length:
            raise BadSample(DAMAGED, self.where(sample), "the shard is shorter than it was")
        return ((suffix, content[offset - start :][:size]) for _, offset, size, suffix in run)


class TarItems(Items):
    """Items of shards. What was passed over in them stands behind the samples as bad items, so that it is counted."""

    def __init__(self, tar: TarSamples):
        self.tar = tar

    def __len__(self) -> int:
        return len(self.tar) + len(self.tar.skipped)

    def where(self, index: int) -> str:
        passed_over = index - len(self.tar)
        return self.tar.where(index) if passed_over < 0 else self.tar.skipped[passed_over].where

    @property
    def fingerprint(self) -> str:
        return self.tar.fingerprint

    def read(self, index: int, suffixes: Collection[str], most: int = LARGEST_MEMBER) -> dict[str, bytes]:
        """As of `TarSamples`. Raises `BadSample` also for an item that was passed over."""
        if index >= len(self.tar):
            where, reason, detail = self.tar.skipped[index - len(self.tar)]
            raise BadSample(reason, where, detail)
        return self.tar.read(index, suffixes, most)


def _runs(places: list[tuple[int, int, int, str]]) -> list[list[tuple[int, int, int, str]]]:
    """Sorted (file, offset, size, suffix), in runs that are worth one read each."""
    runs = []
    for place in places:
        last = runs[-1][-1] if runs else None
        if last and last[0] == place[0] and place[1] - last[1] - last[2] <= NEAR:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


# Which files


def find_shards(path: str) -> tuple[Path, list[str]]:
    """A folder, and the shards under it as sorted relative paths. Raises `SprintError` if any is missing."""
    place = Path(path)
    if place.is_dir():
        names = _walk(place)
        compressed = [name for name in names if name.endswith(_COMPRESSED_NAMES)]
        if compressed:
            raise SprintError(
                f"{place / compressed[0]}: compressed; unpack it to a plain .tar, or move it away"
            )
        shards = [name for name in names if name.endswith(".tar")]
        if not shards:
            raise SprintError(
                f"{path}: no .tar shards in this folder (there {what_is_in(place)}); set data.path to where they are"
            )
        return place, shards
    files = [path] if place.exists() or "{" not in path else expand_braces(path)
    for file in files:
        if not os.path.isfile(file):
            raise SprintError(
                f"{file}: no such shard; set data.path to a folder of .tar shards, or to a pattern "
                "such as x-{000..015}.tar"
            )
    files = [os.path.abspath(file) for file in files]
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    return Path(root), [os.path.relpath(file, root) for file in files]


def _walk(folder: Path) -> list[str]:
    """Regular files at any depth, sorted by relative path."""
    paths = (os.path.join(root, name) for root, names in files_in(folder) for name in names)
    return sorted(os.path.relpath(path, folder) for path in paths if os.path.isfile(path))


def expand_braces(pattern: str) -> list[str]:
    """x{000..002}{a,b} names six files, in that order. Zeros in front set the width."""
    group = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not group:
        return [pattern]
    first, last, words = group.groups()
    if words is None and int(last) < int(first):
        raise SprintError(f"{pattern}: {group[0]} is no range of shards; write the smaller number first")
    if words is None and int(last) - int(first) >= MOST_SHARDS:
        raise SprintError(f"{pattern}: {group[0]} would be more than {MOST_SHARDS:,} shards")
    numbers = () if words is not None else range(int(first), int(last) + 1)
    choices = words.split(",") if words is not None else [f"{n:0{len(first)}}" for n in numbers]
    rest = expand_braces(pattern[group.end() :])
    return [pattern[: group.start()] + choice + end for choice in choices for end in rest]


def _with_sidecars(root: Path, names: list[str], wanted: bool) -> list[list[str]]:
    """Each shard with the .json files that belong to it: to the shard with the longest name that begins theirs."""
    groups = {os.path.splitext(name)[0]: [name] for name in names}
    for folder in sorted({os.path.dirname(name) for name in names}) if wanted else ():
        for name in sorted(_listed(root / folder)):
            stem, suffix = os.path.splitext(os.path.join(folder, name))
            owner = owner_of(stem, groups) if suffix == ".json" else None
            if owner is not None and (root / folder / name).is_file():
                groups[owner].append(os.path.join(folder, name))
    return [groups[os.path.splitext(name)[0]] for name in names]


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise SprintError(f"{folder}: cannot be read: {error.strerror}") from error
