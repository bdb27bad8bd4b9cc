"""One shard of a cache: NNNNNN.tar, and its record NNNNNN.json, which is written once the tar is whole.

NNNNNN.tar    for every sample KEY.json (prompt, height and width in pixels, index in the source) and
              KEY.safetensors (latent [C, h, w], text [T, D]; of a trajectory states and velocity [K, C, h, w] too,
              and in fp32 t [K] and guidance []); KEY is the index in nine digits
NNNNNN.json   a `Record`

The same samples give the same bytes: the tar knows no times and no owners. Being made, it is
.NNNNNN.tar.HOST.PROCESS.part; what a process that died has left so is swept away.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import safetensors.torch
import torch
from pydantic import NonNegativeInt

from sprint.base.door import read_as
from sprint.base.errors import SprintError
from sprint.base.files import scrap_of, sha256, write_whole
from sprint.base.locks import locked
from sprint.data.batch import Encoded, flat

ABOUT, TENSORS = "json", "safetensors"  # suffixes of a sample's two entries
EXACT = ("t", "guidance")  # what half precision would change


class Entry(NamedTuple):
    """A sample on its way into a shard. index: in the source; height, width: of its picture in pixels"""

    index: int
    prompt: str
    height: int
    width: int
    encoded: Encoded


class Skipped(NamedTuple):
    """A sample of the source that could not be used, and why: the words of a `BadSample`."""

    index: int
    reason: str
    where: str


class Record(NamedTuple):
    """A whole shard.

    bytes, sha256   of the tar
    samples         how many it holds
    first           index in the source at which it begins
    skipped         in the order of the source
    """

    bytes: NonNegativeInt
    sha256: str
    samples: NonNegativeInt
    first: NonNegativeInt
    skipped: list[Skipped]


def tar_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.tar"


def record_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"


# ---- writing ----------------------------------------------------------------------------------------


def write_shard(
    folder: Path, number: int, first: int, samples: Iterable[Entry | Skipped], dtype: torch.dtype
) -> Record:
    """Write shard `number`, whose first sample is number `first` of the source, with tensors as `dtype`.

    Whole or not at all, whatever `samples` raises. One that another process has put there meanwhile is kept.
    Raises SprintError where it cannot be written.

    -> the record of the shard that stands there
    """
    tar = tar_path(folder, number)
    scrap = scrap_of(tar)
    try:
        with open(scrap, "wb") as file:
            count, skipped = _fill(file, samples, dtype)
            file.flush()
            os.fsync(file.fileno())
        record = Record(scrap.stat().st_size, sha256(scrap), count, first, skipped)
        with locked(folder_lock(folder)):
            if is_whole(folder, number):
                return read_record(folder, number)
            record_path(folder, number).unlink(missing_ok=True)  # of the tar that this one replaces
            os.replace(scrap, tar)
            write_whole(record_path(folder, number), json.dumps(record._asdict()))
    except OSError as error:
        raise SprintError(
            f"{tar}: cannot be written: {error.strerror or error}; whole shards are kept: "
            "mend that and run the same command again"
        ) from error
    finally:
        scrap.unlink(missing_ok=True)
    return record


def _fill(
    file: BinaryIO, samples: Iterable[Entry | Skipped], dtype: torch.dtype
) -> tuple[int, list[Skipped]]:
    """-> how many samples were written, and what was skipped"""
    count, skipped = 0, []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            if isinstance(sample, Skipped):
                skipped.append(sample)
                continue
            about = {name: value for name, value in sample._asdict().items() if name != "encoded"}
            tensors = {
                name: x.to(torch.float32 if name in EXACT else dtype).contiguous()
                for name, x in flat(sample.encoded).items()
            }
            _add(tar, f"{sample.index:09d}.{ABOUT}", json.dumps(about).encode())
            _add(tar, f"{sample.index:09d}.{TENSORS}", safetensors.torch.save(tensors))
            count += 1
    return count, skipped


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # time, owner and group are 0
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def folder_lock(folder: Path) -> Path:
    """Whoever changes which files stand in the folder holds it."""
    return folder / ".lock"


# ---- reading ----------------------------------------------------------------------------------------


def read_record(folder: Path, number: int) -> Record:
    """Raises SprintError where it is missing or damaged."""
    path = record_path(folder, number)
    try:
        return read_as(Record, path)
    except SprintError as error:
        raise SprintError(f"{path}: missing or damaged; run the same `sprint cache` again") from error


def is_whole(folder: Path, number: int) -> bool:
    """True where tar and record are there and agree in size."""
    try:
        return tar_path(folder, number).stat().st_size == read_record(folder, number).bytes
    except (OSError, SprintError):
        return False
