"""From the bytes of a picture to the uint8 RGB that a sample holds, and from its header to its size."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sprint.base.door import regular_file
from sprint.base.errors import SprintError
from sprint.data.items import BadSample, said

# Pillow's decoders that run no other program, and the suffixes of their files. Which of them has read a file is told
# by its first bytes alone, so that a suffix may lie. AVIF is there if Pillow was built with it.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2",),
    "PPM": (".ppm", ".pgm"),
}
DECODERS = tuple(FORMATS)
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
LARGEST = 2**26  # pixels: 200 MB of RGB; Pillow itself warns from 2^26.4 on
LARGEST_FILE = 2**29  # bytes
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {  # what turns a picture of that orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Shape = tuple[int, int]  # height, width in pixels


def picture_from(file: str | Path | BinaryIO, shapes: Sequence[Shape], where: str) -> np.ndarray:
    """The centre of a picture, resampled (Lanczos, antialiased) to the one of `shapes` nearest in aspect.

    where   names the picture in the `BadSample` that is raised for one that is damaged, none or too large

    -> uint8 [height, width, 3]
    """
    with _opened(file, where) as image:
        upright = _eight_bits(image)
        height, width = nearest(shapes, (upright.height, upright.width))
        fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
        return np.asarray(fitted.convert("RGB"))


def size_from(file: str | Path | BinaryIO, where: str) -> Shape:
    """Height and width of a picture, upright, from its header. Raises `BadSample` as `picture_from` does."""
    return header_from(file, where)[1]


def header_from(file: str | Path | BinaryIO, where: str) -> tuple[str, Shape]:
    """-> one of `FORMATS`, and the size as `size_from` gives it. Raises `BadSample`."""
    with _opened(file, where) as image:
        on_its_side = _orientation(image) >= 5
        return image.format, image.size if on_its_side else image.size[::-1]


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, turned upright as its EXIF says; transparent parts become white. Of an animation the first frame.

    Raises ValueError for pixels that no picture on a screen has.
    """
    return _eight_bits(image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The same, as L where it is grey: a third of the memory."""
    image.load()
    if (orientation := _orientation(image)) in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255
        low, high = image.getextrema()
        if not 0 <= low <= high < 2**16:
            raise ValueError(f"grey values from {low} to {high}; expected 8 or 16 bits")
        return Image.fromarray(np.round(np.asarray(image) / np.float32(257)).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def nearest(shapes: Sequence[Shape], size: Shape) -> Shape:
    """The shape whose height over width is nearest, as diffusers' pipelines choose it."""
    aspect = size[0] / size[1]
    return min(shapes, key=lambda shape: abs(shape[0] / shape[1] - aspect))


def _orientation(image: Image.Image) -> int:
    """1 to 8 as EXIF numbers them; 1 where EXIF is absent or damaged: the pixels may be whole all the same."""
    try:
        exif = Image.Image.getexif(image)  # PNG's own method decodes the picture first
        orientation = exif.get(ORIENTATION)
        return int(orientation) if orientation in UPRIGHT else 1
    except Exception:  # Pillow's parser lets many kinds through
        return 1


@contextmanager
def _opened(file: str | Path | BinaryIO, where: str) -> Iterator[Image.Image]:
    """The picture, its header read and its pixels not, with every way to fail as a `BadSample`."""
    try:
        if isinstance(file, str | Path):
            regular_file(file, LARGEST_FILE)  # a pipe would never end
        with Image.open(file, formats=DECODERS) as image:
            if image.width * image.height > LARGEST:
                raise BadSample("picture too large", where, f"{image.width}×{image.height} pixels")
            yield image
    except UnidentifiedImageError as error:
        raise BadSample("unreadable picture", where, f"none of {', '.join(DECODERS)}") from error
    except Image.DecompressionBombError as error:
        raise BadSample("picture too large", where, said(error)) from error
    except SprintError as error:
        raise BadSample("unreadable picture", where, said(error.__cause__ or error)) from error
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # Pillow has no list of what its decoders raise
        raise BadSample("unreadable picture", where, said(error)) from error
