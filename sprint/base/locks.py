"""One process at a time: locks on open files, which the kernel drops when the file is closed or the process ends."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCKS = fcntl is not None  # whether this platform has any
# of an OSError: the file system, or the platform, has none
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def lock(file: IO, wait: bool = True) -> bool:
    """Take the file's lock until it is closed.  -> False if another process has it and we do not wait

    Raises OSError where there are no locks (`NO_LOCKS`).
    """
    if not LOCKS:
        raise OSError(errno.ENOSYS, "no file locks on this platform")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process is between the same lines. Makes the file at `path`, in a folder that is there."""
    with open(path, "a") as file:
        lock(file)
        yield
