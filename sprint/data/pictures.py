"""From the bytes of a picture to the uint8 RGB that a sample holds, and from its header to its size."""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sprint.data.items import BadSample, said

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
DECODERS = ("JPEG", "PNG", "WEBP")
LARGEST = 2**26  # pixels: 200 MB of RGB; Pillow itself warns from 2^26.4 on
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 lie on their side

# What Pillow raises on files that are damaged or are no pictures.
_BAD = (OSError, ValueError, SyntaxError, EOFError, struct.error)

Shape = tuple[int, int]  # height, width in pixels


def picture_from(file: str | Path | BinaryIO, shapes: Sequence[Shape], where: str) -> np.ndarray:
    """The centre of a picture, resampled (Lanczos, antialiased) to the one of `shapes` nearest in aspect.

    where   names the picture in the `BadSample` that is raised for one that is damaged, none or too large

    -> uint8 [height, width, 3]
    """
    with _opened(file, where) as image:
        upright = to_rgb(image)
        height, width = nearest(shapes, (upright.height, upright.width))
        return np.asarray(ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS))


def size_from(file: str | Path | BinaryIO, where: str) -> Shape:
    """Height and width of a picture, upright, from its header. Raises `BadSample` as `picture_from` does."""
    with _opened(file, where) as image:
        exif = Image.Image.getexif(image)  # the method of PNG decodes the whole picture
        on_its_side = exif.get(ORIENTATION, 1) in (5, 6, 7, 8)
        return image.size if on_its_side else image.size[::-1]


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, turned upright (in place) as its EXIF says; transparent parts become white."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def nearest(shapes: Sequence[Shape], size: Shape) -> Shape:
    """The shape whose height over width is nearest, as diffusers' pipelines choose it."""
    aspect = size[0] / size[1]
    return min(shapes, key=lambda shape: abs(shape[0] / shape[1] - aspect))


@contextmanager
def _opened(file: str | Path | BinaryIO, where: str) -> Iterator[Image.Image]:
    """The picture, its header read and its pixels not, with every way to fail as a `BadSample`."""
    try:
        with Image.open(file, formats=DECODERS) as image:
            if image.width * image.height > LARGEST:
                raise BadSample("picture too large", where, f"{image.width}×{image.height} pixels")
            yield image
    except UnidentifiedImageError as error:
        raise BadSample("unreadable picture", where, "not a JPEG, PNG or WebP") from error
    except Image.DecompressionBombError as error:
        raise BadSample("picture too large", where, said(error)) from error
    except _BAD as error:
        raise BadSample("unreadable picture", where, said(error)) from error
