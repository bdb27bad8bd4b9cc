"""Training state on disk: written whole or not at all, verified before it is trusted, one run per folder.

FOLDER/000007-distill-000400/   one checkpoint: serial number, then the name it was given
    state.pt                    nested plain containers and tensors, readable with weights_only=True
    manifest.json               size and SHA-256 of state.pt
FOLDER/.writing-…               a checkpoint in the making; the next save sweeps what a crash left
"""

import fcntl
import json
import os
import pickle
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO, TextIO

import torch

from sprint.errors import SprintError
from sprint.files import sha256, write_whole

STATE, MANIFEST = "state.pt", "manifest.json"
TEMPORARY = ".writing-"

# ---- save -------------------------------------------------------------------------------------------


def save(folder: Path, step_name: str, state: dict, keep: int = 2) -> Path:
    """Write one checkpoint, then prune all but the newest `keep` (1 or more).  -> its path

    state      nested dicts, lists and tuples of tensors, int, float, bool, str and None
    step_name  for people: "distill-000400"; order comes from the serial number before it

    Raises TypeError for what `load` could not read back, naming its key; SprintError if it cannot be
    written (disk full, say): the older checkpoints are then untouched and nothing is left behind.
    """
    _require_plain(state, "state")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{TEMPORARY}*/{STATE}"):
            shutil.rmtree(leftover.parent)
        older = _checkpoints(folder)
        serial = _serial(older[0]) + 1 if older else 1
        path = _write_whole(folder / f"{serial:06d}-{step_name}", state)
        for old in older[keep - 1 :]:
            shutil.rmtree(old)
    except OSError as error:
        raise SprintError(
            f"cannot write checkpoint {step_name} in {folder}: {error.strerror}; "
            "earlier checkpoints are safe: free some space and run the same command again"
        ) from error
    return path


def _write_whole(path: Path, state: dict) -> Path:
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        temporary.mkdir()
        with open(temporary / STATE, "wb") as file:
            _serialise(state, file)
            _flush(file)
        manifest = {"sha256": sha256(temporary / STATE), "bytes": (temporary / STATE).stat().st_size}
        with open(temporary / MANIFEST, "w") as file:
            json.dump(manifest, file)
            _flush(file)
        _flush_folder(temporary)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _serialise(state: dict, file: BinaryIO) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # how torch's writer reports a failed write
            raise error.__context__ from None
        raise


def _flush(file: BinaryIO | TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_plain(value: object, where: str) -> None:
    """weights_only=True reads just these types; a subclass (an Enum, a NumPy scalar) would fail at load."""
    if isinstance(value, torch.Tensor) or type(value) in (int, float, bool, str, type(None)):
        return
    if type(value) in (dict, OrderedDict):
        items = value.items()
    elif type(value) in (list, tuple):
        items = enumerate(value)
    else:
        raise TypeError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold")
    for key, item in items:
        _require_plain(item, f"{where}[{key!r}]")


# ---- load -------------------------------------------------------------------------------------------


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that matches its manifest, or None. Damaged ones are named and skipped."""
    for path in _checkpoints(folder):
        if _intact(path):
            return path
        print(f"warning: checkpoint {path} is damaged; falling back to the one before it", file=sys.stderr)
    return None


def load(path: Path) -> dict:
    """The state that `save` wrote, tensors on the CPU.  Raises SprintError if it cannot be read."""
    try:
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise SprintError(
            f"cannot read checkpoint {path}: delete it to resume from the one before"
        ) from error


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((m.parent for m in folder.glob(f"[0-9]*-*/{MANIFEST}")), key=_serial, reverse=True)


def _serial(path: Path) -> int:
    return int(path.name.split("-")[0])


def _intact(path: Path) -> bool:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if (path / STATE).stat().st_size != manifest["bytes"]:
            return False
        return sha256(path / STATE) == manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


# ---- one run per folder -----------------------------------------------------------------------------

# Kept open: the kernel drops the locks when this process ends, however it ends.
_locks: dict[Path, TextIO] = {}


def claim(folder: Path, recipe_hash: str) -> None:
    """Make `folder` this recipe's and, until the process ends, this process's. Claiming it again is free.

    Raises SprintError if another process is running in it, or another recipe has been.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() not in _locks:
            _locks[folder.resolve()] = _lock(folder)
        owner = _owner(folder, recipe_hash)
    except OSError as error:
        raise SprintError(f"cannot use {folder} for a run: {error.strerror}") from error
    if owner != recipe_hash:
        raise SprintError(
            f"{folder} holds a run of another recipe ({owner}, this one is {recipe_hash}): "
            "choose another name=... or delete the folder"
        )


def _owner(folder: Path, recipe_hash: str) -> str:
    """The hash of the recipe that has `folder`: from now on this one, if there was none."""
    owner = folder / "recipe.hash"
    if not owner.exists():
        write_whole(owner, recipe_hash + "\n")
    return owner.read_text().strip()


def _lock(folder: Path) -> TextIO:
    file = open(folder / ".lock", "a+")  # noqa: SIM115 (kept open on purpose)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise SprintError(
            f"{folder} is in use by process {holder}: wait for it or choose another name=..."
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
