"""Files of pictures and captions, whole and damaged, for tests of what reads them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def write_pair(folder: Path, name: str, color=(10, 20, 30), caption: str | None = None, size=(8, 8)) -> Path:
    """NAME.png of one colour, `size` wide and high, and NAME.txt.  -> the picture"""
    picture = folder / f"{name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(picture)
    (folder / f"{name}.txt").write_text(caption or f"caption {name}")
    return picture


def write_folder(folder: Path) -> Path:
    """Seven pairs p0 … p6, one of them two folders down; picture k is of colour (k, k, k)."""
    for k in range(6):
        write_pair(folder, f"p{k}", color=(k, k, k))
    write_pair(folder, "deep/er/p6", color=(6, 6, 6))
    return folder


def png_of_claimed_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its data does not have."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def noise_bytes(form: str, **options) -> bytes:
    """64×64 pixels of noise."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()
