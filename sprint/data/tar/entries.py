"""What the headers of an uncompressed tar say, and the keys of a JSON file, when strangers wrote them.

Nothing is extracted. An entry that is no plain file under a plain relative name is passed over and reported;
a header that cannot be trusted ends its shard, since where the next one lies is known from it alone.
"""

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

BLOCK = tarfile.BLOCKSIZE
LARGEST_EXTENSION = 2**20  # bytes of a pax or long-name header
LARGEST_SIDECAR = 2**30  # bytes
LONGEST_NAME = 1024

HOSTILE, REPEATED, DAMAGED, CAPTIONS = (
    "hostile entry",
    "repeated entry",
    "damaged shard",
    "unreadable caption",
)

_UNSAFE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and bytes that are no UTF-8
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_LINKS_FOLDERS_DEVICES = frozenset(tarfile.SUPPORTED_TYPES) - frozenset(tarfile.REGULAR_TYPES + _EXTENSIONS)

Skip = Callable[[str, str, str], None]  # (place in the file, reason, detail)


class File:
    """A file opened for reading anywhere. It closes with its last user, not with whoever lets go of it first."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._descriptor).st_size

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, start: int, length: int) -> bytes:
        """Less than `length` only at the end of the file."""
        return os.pread(self._descriptor, length, start)


class Entry(NamedTuple):
    """Bytes `offset` to `offset + size` of a file, under a name."""

    name: str
    offset: int
    size: int


@dataclass
class _Extension:
    """What pax and GNU headers say of the entry after them."""

    name: str | None = None
    size: int | None = None
    problem: str = ""


def tar_entries(file: File, skip: Skip) -> Iterator[Entry]:
    """The regular files of a tar, in order; `skip` hears of everything else but folders."""
    position, extension = 0, _Extension()
    while (block := file.read(position, BLOCK)) != bytes(BLOCK):
        place = f"byte {position}"
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return skip(place, DAMAGED, "no tar header" if len(block) == BLOCK else "it ends early")
        start = position + BLOCK
        if header.type == tarfile.GNUTYPE_SPARSE:
            start = _after_sparse_map(file, block, start)
        size = header.size
        if header.type in _LINKS_FOLDERS_DEVICES:
            size = 0  # they carry no data, whatever they claim
        elif header.type not in _EXTENSIONS and extension.size is not None:
            size = extension.size
        if not 0 <= size <= file.size - start:
            return skip(f"{place}, {_shown(header.name)}", DAMAGED, f"an entry of {size} bytes does not fit")
        position = start + -(-size // BLOCK) * BLOCK
        if header.type in _EXTENSIONS:
            _extend(extension, header.type, file, start, size)
            continue
        name = header.name if extension.name is None else extension.name
        problem = extension.problem or _problem(header.type, name)
        extension = _Extension()
        if problem:
            skip(f"{place}, {_shown(name)}", HOSTILE, problem)
        elif header.isreg():
            yield Entry(name, start, size)


def _problem(kind: bytes, name: str) -> str:
    if kind == tarfile.GNUTYPE_SPARSE:
        return "a sparse file"
    if kind not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE):
        return "a link, a device or of an unknown type"
    if _UNSAFE.search(name):
        return "a name with control characters, or no UTF-8"
    if len(name) > LONGEST_NAME:
        return f"a name of {len(name)} characters"
    if name.startswith("/") or ".." in name.split("/"):
        return "a path that leads out of the shard"
    return ""


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 80 else name[:80] + "...")


def _after_sparse_map(file: File, block: bytes, position: int) -> int:
    """Where the data of a GNU sparse file begins: behind the blocks that go on with its map."""
    more = block[482]
    while more and len(block := file.read(position, BLOCK)) == BLOCK:
        position, more = position + BLOCK, block[504]
    return position


def _extend(extension: _Extension, kind: bytes, file: File, start: int, size: int) -> None:
    """Take in a header about the next entry. One for all entries may neither name nor measure them."""
    if kind in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
        return
    if size > LARGEST_EXTENSION:
        extension.problem = f"a header of {size} bytes"
        return
    content = file.read(start, size)
    if kind == tarfile.GNUTYPE_LONGNAME:
        extension.name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
        return
    try:
        records = dict(_pax_records(content))
        extension.name = records.get("path", extension.name)
        extension.size = int(records["size"]) if "size" in records else extension.size
    except ValueError:
        extension.problem = "a damaged pax header"
        return
    if any(key.startswith("GNU.sparse") for key in records):
        extension.problem = "a sparse file"


def _pax_records(content: bytes) -> Iterator[tuple[str, str]]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header, LENGTH in bytes of the whole. Raises ValueError."""
    content = content.rstrip(b"\0")
    while content:
        digits, _, _ = content[:20].partition(b" ")
        length = int(digits)
        key, equals, value = content[len(digits) + 1 : length].partition(b"=")
        if length not in range(1, len(content) + 1) or not equals or not value.endswith(b"\n"):
            raise ValueError("not a pax record")
        yield key.decode("utf-8", "surrogateescape"), value[:-1].decode("utf-8", "surrogateescape")
        content = content[length:]


def json_values(file: File, skip: Skip) -> Iterator[Entry]:
    """Where each value of a JSON object lies, under its key; one that is damaged gives what is before the damage."""
    try:
        if file.size > LARGEST_SIDECAR:
            raise ValueError(f"{file.size} bytes are too many")
        yield from _values(file.read(0, file.size).decode("utf-8-sig"), file)
    except (ValueError, RecursionError) as error:
        skip("", CAPTIONS, str(error))


_MARK = re.compile(r"\s*([{,:}])\s*")


def _values(text: str, file: File) -> Iterator[Entry]:
    decode = json.JSONDecoder().raw_decode
    offset = file.size - len(text.encode())  # of text[counted], in bytes
    place = counted = 0
    mark = _mark(text, place, "{")
    while mark[1] != "}" and text[mark.end() : mark.end() + 1] != "}":
        key, place = decode(text, mark.end())
        start = _mark(text, place, ":").end()
        _, place = decode(text, start)
        offset += len(text[counted:start].encode())
        size = len(text[start:place].encode())
        if isinstance(key, str):
            yield Entry(key, offset, size)
        offset, counted = offset + size, place
        mark = _mark(text, place, ",}")


def _mark(text: str, place: int, allowed: str) -> re.Match:
    mark = _MARK.match(text, place)
    if not mark or mark[1] not in allowed:
        raise ValueError(f"no JSON object of KEY: value (character {place})")
    return mark
