"""One run per folder: a folder belongs to one recipe for good, and to one process at a time."""

import logging
import os
import re
from pathlib import Path
from typing import TextIO

from sprint.base.door import read_text, shown
from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.base.locks import NO_LOCKS, lock

log = logging.getLogger(__name__)
HASH, HASH_BYTES = re.compile(r"[0-9a-f]{12}"), 1000

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
    found = read_text(owner, HASH_BYTES).strip()
    if not HASH.fullmatch(found):
        raise SprintError(f"{owner} is damaged; delete it if the run in {folder} is this recipe's")
    return found


def _lock(folder: Path) -> TextIO:
    file = open(folder / ".lock", "a+", errors="replace")  # noqa: SIM115 (kept open on purpose)
    try:
        free = lock(file, wait=False)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s: its file system knows no locks, so a second run there would not be noticed", folder)
        free = True
    if not free:
        file.seek(0)
        holder = shown(file.read(20).strip())
        file.close()
        raise SprintError(f"{folder} is in use by process {holder}: wait for it or choose another name=...")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
