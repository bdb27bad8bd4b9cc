"""Pictures as PNG files: written whole, read with errors that name them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from sprint.base.door import regular_file
from sprint.base.errors import SprintError
from sprint.base.files import write_whole

# what Pillow raises; SyntaxError for a broken PNG
BROKEN = (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, Image.DecompressionBombError)
BROKEN = (*BROKEN, struct.error, zlib.error, SprintError)
PNG_BYTES = 2**30


def write_png(path: Path, picture: np.ndarray) -> Path:
    """picture: uint8 [H, W, 3]; whole or not at all."""
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "PNG")
    return write_whole(path, png.getvalue())


def read_png(path: Path) -> np.ndarray:
    """-> uint8 [H, W, 3].  Raises SprintError where the file is damaged."""
    try:
        with Image.open(regular_file(path, PNG_BYTES)) as picture:
            return np.asarray(picture.convert("RGB"))
    except BROKEN as error:
        raise SprintError(
            f"{path}: damaged picture; delete it, the same `sprint evaluate` draws it again"
        ) from error


def is_whole(path: Path) -> bool:
    """Whether the file is a PNG whose checksums are right. Its pixels are not unpacked."""
    try:
        with Image.open(regular_file(path, PNG_BYTES)) as picture:
            picture.verify()
    except BROKEN:
        return False
    return True
