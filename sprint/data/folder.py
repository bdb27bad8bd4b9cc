"""A folder of captioned pictures: NAME.jpg, .jpeg, .png or .webp beside NAME.txt, at any depth."""

import os
import struct
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sprint.data.batch import Sample
from sprint.errors import SprintError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
DECODERS = ("JPEG", "PNG", "WEBP")
# What Pillow raises on files that are damaged, are no pictures, or would fill the memory.
BAD_PICTURE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


class FolderSource:
    """Every picture once an epoch, in an order drawn from (seed, epoch).

    Position p is place p mod N of epoch p // N, for N pictures sorted by path: a folder that changes
    changes the samples. Construction reads names only. Hidden files, and links to folders, are passed over.

    path    folder
    size    pixels, height and width of every sample
    Raises `SprintError` for a missing or empty folder and for pictures and captions without each other;
    `samples` raises it for a picture that cannot be read and for a caption that is empty.
    """

    def __init__(self, path: str | Path, size: int, seed: int = 0):
        self.size, self.seed = size, seed
        self.pairs = find_pairs(Path(path))

    def __len__(self) -> int:
        return len(self.pairs)

    def samples(self, positions: range) -> list[Sample]:
        return [self._sample(position) for position in positions]

    def _sample(self, position: int) -> Sample:
        epoch, place = divmod(position, len(self))
        picture, caption = self.pairs[_order(self.seed, epoch, len(self))[place]]
        return Sample(read_picture(picture, self.size), read_caption(caption))


@lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def find_pairs(folder: Path) -> list[tuple[str, str]]:
    """(picture, caption) paths, sorted."""
    if not folder.is_dir():
        problem = "not a folder" if folder.exists() else "no such folder"
        raise SprintError(f"{folder}: {problem}; set data.path to a folder of pictures with captions")
    pictures, captions = _scan(folder)
    if not pictures:
        raise SprintError(f"{folder}: no pictures there; expected NAME.jpg, .png or .webp beside NAME.txt")
    alone = sorted(pictures[stem] for stem in pictures.keys() - captions.keys())
    if alone:
        counts = f"{len(alone)} of {len(pictures)}"
        raise SprintError(f"{alone[0]}: picture without caption ({counts}); write it in a .txt of that name")
    alone = sorted(captions[stem] for stem in captions.keys() - pictures.keys())
    if alone:
        counts = f"{len(alone)} of {len(captions)}"
        raise SprintError(f"{alone[0]}: caption without picture ({counts}); add the picture or remove it")
    return [(pictures[stem], captions[stem]) for stem in sorted(pictures)]


def _scan(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Pictures and captions by path without suffix."""
    pictures, captions = {}, {}
    kinds = {".txt": captions, **dict.fromkeys(SUFFIXES, pictures)}
    for root, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(names):
            stem, suffix = os.path.splitext(os.path.join(root, name))
            found = kinds.get(suffix.lower())
            if found is None or name.startswith("."):
                continue
            if stem in found:
                raise SprintError(f"{stem}{suffix}: {found[stem]} has the same name; keep one of them")
            found[stem] = stem + suffix
    return pictures, captions


def _refuse(error: OSError) -> None:
    raise SprintError(f"{error.filename}: cannot be read: {error.strerror}") from error


def read_caption(file: str) -> str:
    """The text of a UTF-8 file without the blanks around it."""
    try:
        caption = Path(file).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SprintError(f"{file}: unreadable caption: {_reason(error)}") from error
    if not caption:
        raise SprintError(f"{file}: empty caption; write one, or remove it and its picture")
    return caption


def read_picture(file: str, size: int) -> np.ndarray:
    """The centre square of a picture, resampled (Lanczos, antialiased).  -> uint8 [size, size, 3]"""
    try:
        with Image.open(file, formats=DECODERS) as image:
            picture = ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.LANCZOS)
    except BAD_PICTURE as error:
        raise SprintError(f"{file}: unreadable picture: {_reason(error)}") from error
    return np.asarray(picture)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, turned upright as its EXIF says; transparent parts become white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
