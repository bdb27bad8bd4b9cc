"""Mutations: what becomes of a file on a bad disk, in a hasty editor, or in the hands of somebody who means ill.

Each takes a random generator and the file's bytes and gives other bytes. The same seed gives the same ones.
"""

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Sequence

Mutation = Callable[[random.Random, bytes], bytes]

NUMBERS = (0, -1, 1, 2, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**25)
DEEP = b"[" * 50_000, b'{"a":' * 50_000
VALUES = (
    *NUMBERS, 0.0, 1e308, 1e-320, float("nan"), float("inf"), True, None, "", "x", "\0", "a\nb", "../..", "~nobody/x",
    "x" * 10_000, [], [[]], {}, {"a": {}}, [0] * 1000, "1e99999", "!!int x", "trust_remote_code",
)  # fmt: skip


# ---- of any bytes -----------------------------------------------------------------------------------


def flip(chance: random.Random, content: bytes) -> bytes:
    """A few bits."""
    changed = bytearray(content or b"\0")
    for _ in range(chance.choice((1, 1, 2, 8))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(chance: random.Random, content: bytes) -> bytes:
    """The end is missing."""
    return content[: chance.randrange(len(content) + 1)]


def drop(chance: random.Random, content: bytes) -> bytes:
    """A piece is missing."""
    start = chance.randrange(len(content) + 1)
    return content[:start] + content[start + chance.choice((1, 4, 64, 512)) :]


def repeat(chance: random.Random, content: bytes) -> bytes:
    """A piece is there twice, or very often."""
    start = chance.randrange(len(content) + 1)
    piece = content[start : start + chance.choice((1, 8, 64))]
    return content[:start] + piece * chance.choice((2, 2, 3, 1000)) + content[start:]


def overwrite(chance: random.Random, content: bytes) -> bytes:
    """A number that somebody may count on is another one."""
    value = chance.choice(NUMBERS) & (2**64 - 1)
    packed = chance.choice(
        (struct.pack("<Q", value), struct.pack("<I", value & (2**32 - 1)), b"\xff" * 8, b"\0" * 8)
    )
    start = chance.randrange(len(content) + 1)
    return content[:start] + packed + content[start + len(packed) :]


def other(chance: random.Random, content: bytes) -> bytes:
    """Something else altogether."""
    return chance.choice(
        (
            b"",
            b"\0" * 4096,
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n",
            b"<!DOCTYPE html><html><title>Log in</title></html>",
            b"GGUF\3\0\0\0" + b"\0" * 64,
            b"\x89PNG\r\n\x1a\n" + b"\0" * 64,
            b"\xff\xfe" + "a prompt".encode("utf-16-le"),
            content.decode("latin-1").encode("utf-16"),
            b"\xef\xbb\xbf" + content,
            content.replace(b"\n", b"\r\n"),
            *DEEP,
        )
    )


BYTES = (flip, cut, drop, repeat, overwrite, other)


# ---- of JSON, YAML and lines ------------------------------------------------------------------------


def json_value(chance: random.Random, content: bytes) -> bytes:
    """A value, or a key, somewhere in the tree is another."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):  # mutated before
        return flip(chance, content)
    places = list(_places(tree))
    if not places:
        return json.dumps(chance.choice(VALUES)).encode()
    holder, key = chance.choice(places)
    match chance.randrange(4):
        case 0 if isinstance(holder, dict):
            holder[str(chance.choice(VALUES))] = holder.pop(key)
        case 1 if isinstance(holder, dict):
            del holder[key]
        case _:
            holder[key] = chance.choice(VALUES)
    return json.dumps(tree).encode()


def _places(tree):
    """(container, key) of every value."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from _places(value)


def json_digits(chance: random.Random, content: bytes) -> bytes:
    """A number has thousands of digits."""
    digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    if not digits:
        return content + b"1" * 5000
    at = chance.choice(digits)
    return content[:at] + b"9" * chance.choice((25, 5000)) + content[at:]


def line(chance: random.Random, content: bytes) -> bytes:
    """A line is missing, twice there, or says something strange."""
    lines = content.split(b"\n")
    at = chance.randrange(len(lines))
    strange = (
        b"\0",
        b"\xff\xfe",
        b"- [",
        b"{" * 300,
        b"x" * 100_000,
        b"!!python/object/apply:os.system [ls]",
        b"*a",
        b"&a [*a]",
    )
    match chance.randrange(4):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[at])
        case 2:
            lines.insert(at, chance.choice(strange))
        case _:
            name, colon, _ = lines[at].partition(b":")
            value = json.dumps(chance.choice(VALUES)).encode()
            lines[at] = name + colon + b" " + value if colon else value
    return b"\n".join(lines)


JSON = (json_value, json_value, json_value, json_digits, line, *BYTES)
TEXT = (line, line, line, json_digits, *BYTES)


# ---- of files of tensors ----------------------------------------------------------------------------


def _header_size(content: bytes) -> int:
    return min(int.from_bytes(content[:8], "little"), len(content))


def safetensors_header(chance: random.Random, content: bytes) -> bytes:
    """The header says something else; its length is right."""
    size = _header_size(content)
    header = chance.choice((json_value, json_value, json_digits, flip))(chance, content[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def safetensors_values(chance: random.Random, content: bytes) -> bytes:
    """Some weights are not finite."""
    size = _header_size(content)
    at = 8 + size + 4 * chance.randrange(max(1, (len(content) - 8 - size) // 4))
    return (
        content[:at]
        + chance.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff"))
        + content[at + 4 :]
    )


def zip_entry(chance: random.Random, content: bytes) -> bytes:
    """One file of an archive is mutated, deflated or gone; the archive is whole."""
    made = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
            names = old.namelist()
            chosen = chance.choice([*names, *(name for name in names if name.endswith(".pkl"))])
            for name in names:
                data, how = old.read(name), zipfile.ZIP_STORED
                if name == chosen:
                    which = chance.randrange(6)
                    if which == 0:
                        continue
                    data = chance.choice(BYTES)(chance, data) if which < 5 else data
                    how = zipfile.ZIP_DEFLATED if which == 5 else how
                new.writestr(zipfile.ZipInfo(name), data, how)  # of 1980, whenever it is written
    except (zipfile.BadZipFile, ValueError, RuntimeError, NotImplementedError):
        return flip(chance, content)
    return made.getvalue()


class Runs:
    """Unpickled by a careless reader, it leaves a file behind."""

    def __reduce__(self):
        return open, ("RAN", "w")


def pickled(chance: random.Random, content: bytes) -> bytes:
    """A pickle of something else."""
    things = (
        Runs(),
        {"state_dict": Runs()},
        bytearray(10),
        {1: 2},
        [1],
        "x" * 1000,
        {"model": {"a": 1}},
        None,
    )
    return pickle.dumps(chance.choice(things), protocol=2)


SAFETENSORS = (safetensors_header, safetensors_header, safetensors_header, safetensors_values, *BYTES)
TORCH = (zip_entry, zip_entry, zip_entry, zip_entry, pickled, *BYTES)
LEGACY = (pickled, *BYTES)


def mutated(chance: random.Random, content: bytes, mutations: Sequence[Mutation]) -> bytes:
    """One mutation, sometimes two."""
    for _ in range(chance.choice((1, 1, 1, 2))):
        content = chance.choice(mutations)(chance, content)
    return content
