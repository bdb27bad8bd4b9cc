"""The door: how files that somebody else may have written, or that broke on the way, are read.

Only regular files come in, no larger than their reader says; JSON is as deep and its numbers are as long as a person's
would be; and what has a schema (a pydantic model, a dataclass or any annotated type) is held against it before
anything is built. Whatever is wrong becomes one SprintError that names the file.
"""

import re
import stat
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sprint.base.errors import SprintError

JSON_BYTES = 64 * 2**20  # of one JSON file: an index of 100,000 shards is smaller
TEXT_BYTES = 256 * 2**20  # of a list of prompts
SHOWN = 120  # characters of something foreign in a message

T = TypeVar("T")


def shown(text: object, most: int = SHOWN) -> str:
    """Something foreign for a message: one line, cut short, nothing in it that a terminal would obey."""
    line = "".join(c if c.isprintable() else " " for c in str(text)[: most + 1])
    return line if len(line) <= most else line[:most] + "…"


def at_home(name: str | Path) -> Path:
    """The path with ~ and ~USER as the home folder. Raises SprintError where there is no such user, or a NUL in it."""
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise SprintError(f"{shown(name)}: there is no such user on this machine") from error
    if "\0" in str(path):
        raise SprintError(f"{shown(name)}: a path cannot hold a NUL")
    return path


def check_no_address(name: str) -> None:
    """Raises SprintError for what is an address on the web where a path or a hub id is meant, with the way on."""
    scheme, mark, rest = name.partition("://")
    if not mark or not scheme.isalnum():
        return
    way = "download it, and give the path of that"
    page = f"{scheme}://{rest}".replace("hf://", "https://hf.co/", 1)
    hub = re.match(r"https?://(?:huggingface|hf)\.co/(?:datasets/)?([\w.-]+/[\w.-]+)/?(tree/main/?)?$", page)
    if hub:
        way = f"give its hub id alone: {hub[1]}"
    elif scheme == "file":
        way = f"give the path alone: /{rest.lstrip('/')}"
    raise SprintError(f"{shown(name)} is an address, not a path: {way}")


def regular_file(path: str | Path, most: int | None = None) -> Path:
    """The path of a regular file (links are followed) of at most `most` bytes.

    Raises SprintError for what is missing, cannot be read, is a folder, pipe or device, or is larger.
    """
    path = Path(path)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise SprintError(f"{shown(path)}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise SprintError(f"{shown(path)} is {what}, not a file")
    if most is not None and status.st_size > most:
        raise SprintError(f"{shown(path)} has {status.st_size:,} bytes; such a file has at most {most:,}")
    return path


def read_bytes(path: str | Path, most: int) -> bytes:
    """All of a regular file. Raises SprintError as `regular_file` does."""
    path = regular_file(path, most)
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise SprintError(f"{shown(path)}: {error.strerror or error}") from error
    if len(content) > most:  # it grew
        raise SprintError(f"{shown(path)} has more than {most:,} bytes")
    return content


def read_text(path: str | Path, most: int = TEXT_BYTES) -> str:
    """UTF-8, with or without its mark. Raises SprintError that names what else it looks like."""
    return decode(read_bytes(path, most), path)


def check_text(start: bytes, where: object) -> None:
    """Raise SprintError that says what a file is whose first bytes are no text in UTF-8's manner."""
    marked = start[:2] in (b"\xff\xfe", b"\xfe\xff") or start[:4] == b"\0\0\xfe\xff"
    if marked or b"\0" in start[:4096]:
        wide = start[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
        kind = "UTF-32" if wide else "UTF-16" if marked or b"\0" in start[:2] else "no text"
        hint = f"; save it as UTF-8 (iconv -f {kind} -t UTF-8 OLD > NEW)" if kind != "no text" else ""
        raise SprintError(f"{shown(where)} is {kind}{hint}")


def decode(content: bytes, where: object) -> str:
    """UTF-8 as text. Raises SprintError that names what else it looks like."""
    check_text(content, where)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SprintError(
            f"{shown(where)} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error


def parse_json(content: str | bytes, where: object) -> Any:
    """The value of a JSON text. Raises SprintError that names `where`, also for values nested too deep, or numbers of
    thousands of digits."""
    from pydantic_core import from_json  # `sprint --help` reads nothing

    try:
        return from_json(content)
    except ValueError as error:
        raise SprintError(f"{shown(where)} is not valid JSON: {shown(error)}") from error


def read_json(path: str | Path, most: int = JSON_BYTES) -> dict:
    """A file that is a JSON object. Raises SprintError."""
    content = parse_json(decode(read_bytes(path, most), path), path)
    if not isinstance(content, dict):
        raise SprintError(f"{shown(path)} is not a JSON object")
    return content


@cache
def _adapter(schema: type) -> Any:
    """Made once: a file of a million lines is held against one schema."""
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def held_against(schema: type[T], value: Any, where: object) -> T:
    """`value` as the schema's type, if it is one. Raises SprintError that names the first field that is not."""
    from pydantic import ValidationError

    try:
        return _adapter(schema).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(shown(part, 40) for part in first["loc"])
        given = "" if first["type"] == "missing" else f" (it is {shown(repr(first['input'])[:60], 40)})"
        raise SprintError(f"{shown(where)}: {field + ': ' if field else ''}{first['msg']}{given}") from error


def read_as(schema: type[T], path: str | Path, most: int = JSON_BYTES) -> T:
    """A JSON file as the schema's type. Raises SprintError."""
    return held_against(schema, parse_json(decode(read_bytes(path, most), path), path), path)
