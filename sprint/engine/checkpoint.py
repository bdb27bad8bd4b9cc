"""Training state on disk: written whole or not at all, verified before it is trusted, by any number of processes.

FOLDER/000007-distill-400/    one checkpoint: serial number, then the name it was given
    __0_0.distcp, .metadata   the tensors in PyTorch's distributed checkpoint format (DCP): every process writes
                              its part, and any other number of processes reads its own
    facts.json                what is no tensor: counters, phase, versions
    manifest.json             size and SHA-256 of every other file
FOLDER/.writing-…             a checkpoint in the making, or on its way out; the next save sweeps what a crash left
FOLDER/.damaged-…             one that was found not to match its manifest, for whoever wants to look
"""

import atexit
import contextlib
import json
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from sprint.base.door import JSON_BYTES, read_as, read_bytes, regular_file
from sprint.base.errors import SprintError
from sprint.base.files import flush_folder, put_in_place, remove_whole, sha256, write_flushed
from sprint.engine.dcp import INDEX, CopyingPlanner, Reader, Writer

FACTS, MANIFEST = "facts.json", "manifest.json"
TEMPORARY, DAMAGED = ".writing-", ".damaged-"
NAME = re.compile(r"\d{1,18}-")  # how a checkpoint's begins
PATIENCE = 60.0  # seconds: for a checkpoint in the making when its saver is gone or the program ends

T = TypeVar("T")
Group = dist.ProcessGroup | None
Digests = dict[str, dict[str, int | str]]  # file name -> {"bytes": size, "sha256": hex digest}


@dataclass
class Entry:
    bytes: int
    sha256: str


@dataclass
class Manifest:
    """What is said of every other file, by name."""

    files: dict[str, Entry]


# ---- save -------------------------------------------------------------------------------------------


class Saver:
    """Checkpoints of one stage in `folder`, written in the background, one at a time.

    keep   this many of the newest stay (1 or more); older ones go once the new one is safe
    group  a gloo group over all processes for this object alone, which uses it in a background thread;
           None: one process, no torch.distributed

    `folder` is on a file system that all processes see. Every process makes one Saver and calls `save` and
    `wait` alike. Each process keeps a copy in host memory of what it writes, for the next save to fill again, but
    of a save that is waited for.
    """

    def __init__(self, folder: Path, keep: int = 2, group: Group = None):
        self.folder, self.keep, self.group = folder, keep, group
        _let_writes_end(folder)  # of a saver that an exception cut off
        self._write: _Write | None = None
        self._copies: dict[MetadataIndex, Tensor] = {}

    def save(self, name: str, tensors: dict[str, Tensor], facts: dict, wait: bool = False) -> None:
        """Start a checkpoint. Returns once the tensors are copied and may change again.

        name     for people: "distill-400"; order comes from the serial number before it
        tensors  plain ones, equal on all processes that have them (one of which writes), or DTensors, of which
                 each process writes its shard
        facts    nested dicts (with str keys) and lists of int, float, bool, str and None, of the main process
        wait     return once it is safe on disk, for which nothing is copied, and let earlier copies go

        Raises SprintError if the checkpoint before this one failed, or this one that is waited for; TypeError for
        what could not be read back, naming its key.
        """
        self.wait()
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"tensors[{key!r}] is a {type(tensor).__name__}: put it into facts")
        _require_plain(facts, "facts")
        tensors = {key: tensor.detach() for key, tensor in tensors.items()}
        self._write = _Write(self, name, tensors, json.dumps(facts), still=wait)
        self._write.start()
        self._write.copied.wait()
        if wait:
            self.wait()

    @property
    def troubled(self) -> bool:
        """A background save has failed here: `wait` will raise. Does not block."""
        return self._write is not None and self._write.failure is not None

    def wait(self) -> None:
        """Until the newest checkpoint is safe on disk.

        Raises SprintError, on every process, if it could not be written: the older ones are then untouched
        and nothing is left behind.
        """
        if self._write is None:
            return
        self._write.join()
        if self._write.failure is not None:
            raise SprintError(
                f"cannot write checkpoint {self._write.title} in {self.folder}: {self._write.failure}; "
                "earlier checkpoints are safe: put that right (free some space?) and run the same command again"
            )


class _Write(threading.Thread):
    """One checkpoint on its way to the disk. Every step succeeds on all processes or fails on all.

    A daemon, which DCP's own `async_save` has no way to be: a process whose peer has died must be able to end.
    """

    def __init__(self, saver: Saver, title: str, tensors: dict[str, Tensor], facts: str, still: bool):
        super().__init__(name=f"checkpoint {title}", daemon=True)
        self.title, self.folder, self.failure = title, saver.folder, None
        self.copied = threading.Event()  # or failed before that
        self._keep, self._group = saver.keep, saver.group
        self._rank = 0 if saver.group is None else dist.get_rank(saver.group)
        self._tensors, self._facts = tensors, facts
        self._planner = CopyingPlanner(saver._copies, self.copied, still)

    def run(self) -> None:
        try:
            self._run()
        except (Exception, CheckpointException) as error:  # CheckpointException is not an Exception
            self.failure = _reason(error, self._group)
        finally:
            del self._tensors, self._planner  # the saver keeps this object, not what it was given
            self.copied.set()

    def _run(self) -> None:
        temporary = self.folder / _on_all(self._begin, self._group)[0]
        try:
            _quiet_about_one_process()
            dcp.save(
                self._tensors,
                storage_writer=Writer(temporary),
                planner=self._planner,
                process_group=self._group,
                no_dist=self._group is None,
            )
            digests = _on_all(lambda: self._finish_part(temporary), self._group)
            _on_all(lambda: self._seal(temporary, digests), self._group)
        finally:
            if self._rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _begin(self) -> str:
        """The main process sweeps and makes the temporary folder.  -> its name"""
        if self._rank != 0:
            return ""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        older = _checkpoints(self.folder)
        serial = _serial(older[0]) + 1 if older else 1
        temporary = self.folder / f"{TEMPORARY}{serial:06d}-{self.title}"
        temporary.mkdir()
        return temporary.name

    def _finish_part(self, temporary: Path) -> Digests:
        """Digests of the files that this process wrote."""
        files = list(temporary.glob(f"__{self._rank}_*"))
        if self._rank == 0:
            write_flushed(temporary / FACTS, self._facts)
            files += [temporary / FACTS, temporary / INDEX]
        return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}

    def _seal(self, temporary: Path, digests: list[Digests]) -> None:
        """The main process gives the checkpoint its manifest and its name, then prunes."""
        if self._rank != 0:
            return
        files = {name: entry for part in digests for name, entry in part.items()}
        write_flushed(temporary / MANIFEST, json.dumps({"files": files}))
        flush_folder(temporary)
        put_in_place(temporary, self.folder / temporary.name.removeprefix(TEMPORARY))
        for old in _checkpoints(self.folder)[self._keep :]:
            remove_whole(old, TEMPORARY + old.name)


@atexit.register
def _let_writes_end(folder: Path | None = None) -> None:
    """An exception may leave a checkpoint in the making (in `folder`, or any): let it end, but not for ever."""
    for thread in threading.enumerate():
        if isinstance(thread, _Write) and folder in (None, thread.folder):
            thread.join(PATIENCE)


def _require_plain(value: object, where: str) -> None:
    """JSON gives back just these: a tuple would return as a list, a subclass (an Enum) as its base."""
    if type(value) in (int, float, bool, str, type(None)):
        return
    if type(value) is dict:
        for key in value:
            if type(key) is not str:
                raise TypeError(
                    f"{where} has the key {key!r}, which is not a str: a checkpoint cannot hold it"
                )
        items = value.items()
    elif type(value) is list:
        items = enumerate(value)
    else:
        raise TypeError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold")
    for key, item in items:
        _require_plain(item, f"{where}[{key!r}]")


# ---- all processes together -------------------------------------------------------------------------


def _on_all(work: Callable[[], T], group: Group) -> list[T]:
    """Run `work` on every process.  -> all results, by rank; SprintError on all if it failed on one."""
    result, reason = None, None
    try:
        result = work()
    except Exception as error:
        reason = _reason(error)
    outcomes = [(result, reason)]
    if group is not None:
        outcomes *= dist.get_world_size(group)
        dist.all_gather_object(outcomes, (result, reason), group=group)
    for rank, (_, reason) in enumerate(outcomes):
        if reason is not None:
            raise SprintError(reason + _place(rank, group))
    return [result for result, _ in outcomes]


def _reason(error: BaseException, group: Group = None) -> str:
    """What went wrong, in a few words on one line."""
    if isinstance(error, CheckpointException):
        rank = min(error.failures)
        return _reason(error.failures[rank][0]) + _place(rank, group)
    if isinstance(error, SprintError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # of a collective: that of work comes without group
    if isinstance(error, RuntimeError) and group is not None:
        return "another process has ended or does not answer"
    return " ".join(f"{type(error).__name__}: {error}".splitlines()[:1])


def _place(rank: int, group: Group) -> str:
    return "" if group is None else f" (process {rank})"


def _quiet_about_one_process() -> None:
    """DCP warns whenever it serves a single process. A filter, since `catch_warnings` is not for threads."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


# ---- read -------------------------------------------------------------------------------------------


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that matches its manifest, or None. Damaged ones are named and skipped.

    One that this process is still writing there is waited for.
    """
    _let_writes_end(folder)
    found = _checkpoints(folder)
    for older, path in enumerate(found, start=1):
        if _intact(path):
            return path
        then = (
            "falling back to the one before it" if found[older:] else "none is left, this stage starts anew"
        )
        print(f"warning: checkpoint {path} is damaged; {then}", file=sys.stderr)
        with contextlib.suppress(OSError):  # so that it does not count among those that are kept
            path.rename(path.with_name(f"{DAMAGED}{path.name}"))
    return None


def read_facts(path: Path) -> dict:
    """The facts that `Saver.save` was given, floats bit for bit.  Raises SprintError if they cannot be read."""
    try:
        # not the door's JSON, which knows neither half a surrogate nor every bit of a NaN
        facts = json.loads(read_bytes(path / FACTS, JSON_BYTES))
    except (SprintError, ValueError, RecursionError) as error:
        raise _unreadable(path, _reason(error)) from error
    if not isinstance(facts, dict):
        raise _unreadable(path, f"{FACTS} is no object")
    return facts


def read_tensors(path: Path, tensors: dict[str, Tensor], group: Group = None) -> None:
    """Fill `tensors`, any subset of what is stored, in place, on their devices; a DTensor takes its own part.

    group  of all processes, each of which calls this; None: by this process alone

    Raises SprintError, on every process, that names the first key that is not stored or has another shape or
    dtype; or if the checkpoint cannot be read.
    """
    reader = Reader(path)
    _on_all(lambda: _require_stored(path, reader, tensors), group)
    _quiet_about_one_process()
    try:
        dcp.load(
            {key: tensor.detach() for key, tensor in tensors.items()},
            storage_reader=reader,
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise _unreadable(path, _reason(error, group)) from error


def stored_tensors(path: Path, reader: Reader | None = None) -> dict[str, TensorStorageMetadata]:
    """Size and dtype of every tensor in a checkpoint, by its key. Raises SprintError where they cannot be read."""
    try:
        stored = (reader or Reader(path)).read_metadata().state_dict_metadata
    except Exception as error:  # a broken pickle raises whatever it likes
        raise _unreadable(path, _reason(error)) from error
    return {key: facts for key, facts in stored.items() if isinstance(facts, TensorStorageMetadata)}


def _require_stored(path: Path, reader: Reader, tensors: dict[str, Tensor]) -> None:
    stored = stored_tensors(path, reader)
    for key, tensor in tensors.items():
        there, wanted = stored.get(key), f"{tensor.dtype} {tuple(tensor.shape)}"
        found = f"{there.properties.dtype} {tuple(there.size)}" if there else "nothing"
        if found != wanted:
            raise SprintError(
                f"checkpoint {path} has {found} under {key!r} where {wanted} is wanted: it is of another network, "
                "optimizer or version of sprint; choose another name=... or delete it"
            )


def _unreadable(path: Path, reason: str) -> SprintError:
    return SprintError(f"cannot read checkpoint {path}: {reason}; delete it to resume from the one before")


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = (manifest.parent for manifest in folder.glob(f"[0-9]*-*/{MANIFEST}"))
    return sorted((path for path in found if NAME.match(path.name)), key=_serial, reverse=True)


def _serial(path: Path) -> int:
    return int(path.name.split("-")[0])


def _intact(path: Path) -> bool:
    try:
        files = read_as(Manifest, path / MANIFEST).files
        return {INDEX, FACTS} <= files.keys() and all(
            regular_file(path / name).stat().st_size == entry.bytes and sha256(path / name) == entry.sha256
            for name, entry in files.items()
        )
    except (OSError, SprintError):
        return False
