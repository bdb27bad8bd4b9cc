"""Files and folders that are whole or not there."""

import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, data: str | bytes) -> Path:
    """Write `data` (text as UTF-8) beside `path`, then put it in place in one move. Makes the folder.

    Whatever goes wrong, `path` holds either its old content or the new one, and no scrap stays behind.
    Raises OSError that names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scrap = scrap_of(path)
    try:
        scrap.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(scrap, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # name what was asked for
    finally:
        scrap.unlink(missing_ok=True)
    return path


def scrap_of(path: Path) -> Path:
    """Where this process writes what will be `path`: .NAME.HOST.PROCESS.part beside it."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")


def sweep(folder: Path) -> None:
    """Delete what processes of this machine that are gone had begun to write there (`scrap_of`)."""
    for scrap in folder.glob(".*.part"):
        name = re.fullmatch(r"\..+\.(\d+)\.part", scrap.name)
        if (
            name
            and scrap.name.endswith(f".{socket.gethostname()}.{name[1]}.part")
            and not _runs(int(name[1]))
        ):
            scrap.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def write_flushed(path: Path, text: str) -> None:
    """Write a new file, on disk when this returns."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole_or_absent(target: Path, scrap: Path) -> Iterator[Path]:
    """A path in `scrap`, a fresh folder, to build a file or a folder at; at the end it is `target`, in one move.

    After an error, or Ctrl-C, `target` is as it was, and nothing else is left: neither `scrap`, which is best beside
    `target`, nor parents made for it. What a process that was killed left in `scrap` goes first. Raises OSError.
    """
    target, scrap = target.absolute(), scrap.absolute()
    made = [parent for parent in target.parents if not parent.exists()]
    shutil.rmtree(scrap, ignore_errors=True)
    try:
        scrap.mkdir(parents=True)
        yield scrap / target.name
        put_in_place(scrap / target.name, target)
        made = []
    finally:
        shutil.rmtree(scrap, ignore_errors=True)
        for parent in made:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()


def put_in_place(fresh: Path, target: Path) -> None:
    """`fresh` becomes `target`, and stays it if the machine crashes; if that fails, what was there comes back."""
    old = None
    if fresh.is_dir() and target.is_dir():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    try:
        os.replace(fresh, target)
    except BaseException:
        if old:
            os.replace(old, target)
        raise
    flush_folder(target.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def remove_whole(folder: Path, hidden: str) -> None:
    """Delete it under the name `hidden`, so that it is never seen half deleted."""
    going = folder.with_name(hidden)
    os.replace(folder, going)
    shutil.rmtree(going, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Names of its entries on disk, so that a crash of the machine does not undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Everything in `folder` on disk, contents and names."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        flush_folder(Path(root))


def sha256(file: Path) -> str:
    digest, block = hashlib.sha256(), bytearray(4 * 2**20)
    with open(file, "rb", buffering=0) as stream:
        while size := stream.readinto(block):
            digest.update(memoryview(block)[:size])
    return digest.hexdigest()
