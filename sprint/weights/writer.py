"""Writing weights: streamed, and whole or not at all.

safetensors is 8 bytes of header length, a JSON header with every tensor's place, then the bytes
(https://huggingface.co/docs/safetensors). Knowing all shapes beforehand, a file of any size is written one
tensor at a time, which the library's own writer does not do.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path

import torch
from torch import Tensor

from sprint.base.errors import SprintError
from sprint.base.files import whole_or_absent
from sprint.weights.sources import DTYPES

Spec = tuple[torch.dtype, tuple[int, ...]]
WRITE_BYTES = 2**19
CODES = {dtype: code for code, dtype in DTYPES.items()}


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """As `whole_or_absent`, where nothing is yet.

    Raises SprintError where `out` holds something already, and for every OSError on the way (a full disk).
    """
    if out.is_dir() and any(out.iterdir()):
        raise SprintError(f"output folder {out} is not empty; give another one with -o")
    if out.exists() and not out.is_dir():
        raise SprintError(f"output file {out} exists already; give another one with -o")
    try:
        with whole_or_absent(out, out.absolute().parent / f".{out.name}.partial-{os.getpid()}") as place:
            yield place
    except OSError as error:
        raise SprintError(f"cannot write {out}: {error.strerror or error}; nothing was left there") from error


def write_safetensors(
    path: Path, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write `tensors`, which come in the order of `specs`, one by one.

    Wide dtypes should come first, so that every tensor lies aligned. Raises SprintError where a tensor is not
    what its spec says; OSError passes through.
    """
    header, end = {"__metadata__": dict(metadata)}, 0
    for name, (dtype, shape) in specs.items():
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb", buffering=0) as file:
        _write_all(file, len(head).to_bytes(8, "little") + head)
        for (name, tensor), (expected, spec) in zip(tensors, specs.items(), strict=True):
            if name != expected or (tensor.dtype, tuple(tensor.shape)) != spec:
                raise SprintError(f"{name} is {tensor.dtype} {list(tensor.shape)}, planned {expected} {spec}")
            _write_all(file, as_bytes(tensor).numpy().data)


def _write_all(file: RawIOBase, data: bytes | memoryview) -> None:
    """In pieces that fit a processor's cache: twice the speed of one large write."""
    data = memoryview(data)
    while data:
        data = data[file.write(data[:WRITE_BYTES]) :]


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes, row-major: uint8 [nbytes], without a copy where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def write_pickle(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Sana's own format: a PyTorch file with the weights under `state_dict`. Needs memory for all of them."""
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors}
    try:
        torch.save({"state_dict": state}, path)
    except RuntimeError as error:  # torch's zip writer reports a full disk so
        raise OSError(f"torch.save failed ({str(error).splitlines()[0]})") from error
