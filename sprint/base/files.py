"""Files that are whole or not there."""

import hashlib
import os
from pathlib import Path


def write_whole(path: Path, data: str | bytes) -> Path:
    """Write `data` (text as UTF-8) beside `path`, then put it in place in one move. Makes the folder.

    Whatever goes wrong, `path` holds either its old content or the new one, and no scrap stays behind.
    Raises OSError that names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scrap = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        scrap.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(scrap, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # name what was asked for
    finally:
        scrap.unlink(missing_ok=True)
    return path


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
