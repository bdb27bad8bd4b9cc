"""PyTorch's own files: what they hold, and where in the file the numbers of every tensor lie.

A zip with `data.pkl` and one uncompressed part for each storage; before 2020, some pickles one after the other and then
the storages. Both are read as data (`sprint.weights.unpickle`): nothing in them is executed, and nothing but the pickle
is in memory.
"""

import io
import math
import mmap
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from sprint.base.door import shown
from sprint.base.errors import SprintError
from sprint.weights.kinds import Kind
from sprint.weights.unpickle import ODD, Broken, Described, unpickle

LOCAL_HEADER = 30  # bytes of a zip's part before its name
MOST_PICKLE = 2**28  # bytes of a zip's data.pkl, which holds all but the storages
MOST_AXES = 16


class Pickled(NamedTuple):
    """What a file holds, names in it that opening it elsewhere would call, and storages as (first byte, bytes)."""

    file: Path
    size: int  # of the file
    content: Any
    foreign: tuple[str, ...]
    storages: Mapping[str, tuple[int, int]]


class Spot(NamedTuple):
    """Where a tensor's elements lie in its file: from byte `start` on, one every `stride` elements."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def open_pickle(file: Path, kind: Kind) -> Pickled:
    """Raises SprintError for a file that is damaged, truncated, or asks for more than it has."""
    try:
        return _open_zip(file) if kind is Kind.torch_zip else _open_legacy(file)
    except Broken as error:
        why, *foreign = error.args
        if foreign:
            raise SprintError(refusal(file, foreign)) from error
        raise SprintError(f"{shown(file)} is truncated or not a PyTorch checkpoint: {why}") from error


def _open_zip(file: Path) -> Pickled:
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive, open(file, "rb") as stream:
            parts = {part.filename: part for part in archive.infolist()}
            pickles = [name for name in parts if name.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise Broken(f"it has {len(pickles)} parts named data.pkl")
            root = pickles[0].removesuffix("data.pkl")
            for name, part in parts.items():
                if part.compress_type != zipfile.ZIP_STORED or part.file_size > size:
                    raise Broken(f"{shown(name)} in it is compressed, which torch.save never does")
            order = parts.get(f"{root}byteorder")
            if order is not None and archive.read(order) != b"little":
                raise Broken("it was written by a machine of the other byte order")
            if parts[pickles[0]].file_size > MOST_PICKLE:
                raise Broken(f"its pickle has more than {MOST_PICKLE:,} bytes")
            content, foreign, _ = unpickle(io.BytesIO(archive.read(pickles[0])))
            storages = {
                name.removeprefix(f"{root}data/"): (_first_byte(stream, part), part.file_size)
                for name, part in parts.items()
                if name.startswith(f"{root}data/")
            }
    except (Broken, OSError):
        raise
    except Exception as error:  # whatever zipfile meets in a damaged file
        raise Broken("it is a damaged zip") from error
    return Pickled(file, size, content, foreign, storages)


def _first_byte(stream: BinaryIO, part: zipfile.ZipInfo) -> int:
    stream.seek(part.header_offset)
    header = stream.read(LOCAL_HEADER)
    if len(header) < LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise Broken(f"{shown(part.filename)} in it is damaged")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return part.header_offset + LOCAL_HEADER + lengths


def _open_legacy(file: Path) -> Pickled:
    """Magic number, protocol, sizes of that machine, content, keys of the storages; each storage after its length."""
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        size = len(stream)
        machine = [unpickle(stream).content for _ in range(3)][2]
        if isinstance(machine, dict) and machine.get("little_endian") is False:
            raise Broken("it was written by a machine of the other byte order")
        content, foreign, found = unpickle(stream)
        keys, storages, start = unpickle(stream).content, {}, stream.tell()
        for key in map(str, keys if isinstance(keys, list) else []):
            if key not in found or found[key].dtype is None:
                raise Broken(f"its storage {shown(key)} is of a kind unknown here")
            numel = int.from_bytes(stream[start : start + 8], "little")
            storages[key] = (start + 8, numel * found[key].dtype.itemsize)
            start = sum(storages[key])
    return Pickled(file, size, content, foreign, storages)


# ---- tensors ------------------------------------------------------------------------------------------


def no_values(shape: Sequence[int]) -> str:
    """What to say of a tensor without elements."""
    gather = "; ZeRO 3 and FSDP leave such behind: gather the weights, and save those" * (
        tuple(shape) == (0,)
    )
    return f"has no values: its shape is {list(shape)}{gather}"


def spot_of(pickled: Pickled, name: str, tensor: Described) -> Spot:
    """Raises SprintError for a tensor that is no plain one, or whose elements are not all in the file."""
    storage, where = tensor.storage, f"{shown(pickled.file)}: {shown(name)}"
    if storage is not None and storage.location == "meta":
        raise SprintError(f"{where} is {ODD['meta_tensor_no_storage']}")
    if tensor.odd or storage is None or tensor.dtype is None:
        raise SprintError(f"{where} is {tensor.odd or 'of a kind unknown here'}, not a plain one")
    numbers = (tensor.offset, storage.start, *tensor.shape, *tensor.stride)
    if (
        any(type(n) is not int or not 0 <= n < 2**60 for n in numbers)
        or len(tensor.shape) != len(tensor.stride)
        or len(tensor.shape) > MOST_AXES
    ):
        raise SprintError(f"{where} has a shape that no tensor has")
    first, length = pickled.storages.get(storage.key, (0, 0))
    first += storage.start * (storage.dtype or tensor.dtype).itemsize + tensor.offset * tensor.dtype.itemsize
    length -= first - pickled.storages.get(storage.key, (0, 0))[0]
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    numel = math.prod(tensor.shape)
    if not numel:
        raise SprintError(f"{where} {no_values(tensor.shape)}")
    if (last + 1) * tensor.dtype.itemsize > length or first + length > pickled.size:
        raise SprintError(f"{where} is truncated: its elements are not all in the file")
    if numel > last + 1:
        raise SprintError(
            f"{where} is an expanded tensor, {numel:,} elements made of {last + 1:,}; save its contiguous()"
        )
    return Spot(first, tensor.dtype, tensor.shape, tensor.stride)


def read_spot(mapped: Tensor, spot: Spot) -> Tensor:
    """The tensor, mapped where the file has it aligned.

    mapped   all bytes of the file, uint8 [bytes]
    """
    last = sum((size - 1) * step for size, step in zip(spot.shape, spot.stride, strict=True))
    piece = mapped[spot.start : spot.start + (last + 1) * spot.dtype.itemsize]
    if spot.start % spot.dtype.itemsize:
        piece = piece.clone()
    return piece.view(spot.dtype).as_strided(spot.shape, spot.stride)


# ---- what is refused ----------------------------------------------------------------------------------


def refusal(file: Path, foreign: Sequence[str], way: str = "c") -> str:
    """That it would run code elsewhere, and how to make a safe file of it there.

    way   Python that leads from `c`, what torch.load gives there, to dicts of tensors
    """
    names = ", ".join(shown(name) for name in foreign[:3]) + ", …" * (len(foreign) > 3)
    safe = str(file.with_name(f"{file.stem}-safe.pth"))
    code = (
        f"import torch; c = torch.load({str(file)!r}, map_location='cpu', weights_only=False); "
        f"torch.save({way}, {safe!r})"
    )
    return (
        f"{shown(file)} refused: opening it would run code ({names}); if you trust who made it, write its weights "
        f"alone to a file where that code may run: python -c {shlex.quote(code)}"
    )
