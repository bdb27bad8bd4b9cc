"""Rows of pictures on a page: a row for each prompt and seed, a column for each way to draw it."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from sprint.pages.grid import resize_picture

THUMBNAIL = 256  # pixels: larger pictures are reduced to this
SMALL_PICTURE = 96  # pixels; up to here a picture is enlarged, and its pixels stay square


@dataclass(frozen=True)
class Cell:
    """A picture, uint8 [H, W, 3] or None where it is gone, and what is said under it.

    link      to the whole one, if there is one
    correct   None where nobody says right or wrong
    """

    pixels: np.ndarray | None
    link: str = ""
    words: str = ""
    correct: bool | None = None


@dataclass(frozen=True)
class PictureRow:
    """The same prompt and seed, drawn in several ways."""

    caption: str
    aside: str
    cells: Sequence[Cell]


def picture_rows(
    titles: Sequence[tuple[str, str]], rows: Iterable[PictureRow], room: int | None = None
) -> tuple[str, int]:
    """As many rows as fit into `room` bytes, or all.  -> HTML, how many they are"""
    head = "".join(f"<span>{escape(a)}<small>{escape(b)}</small></span>" for a, b in titles)
    drawn, used = [], 0
    for row in rows:
        cells = "".join(map(_picture, row.cells))
        if drawn and room is not None and used + len(cells) > room:
            break
        used += len(cells)
        words = f"<p>{escape(row.caption)}<small>{escape(row.aside)}</small></p>"
        drawn.append(f'<div class="row" style="align-items:start">{words}{cells}</div>')
    top = f'<div class="row head" aria-hidden="true"><p></p>{head}</div>'
    return f'<div class="pictures" style="--columns:{len(titles)}">{top}{"".join(drawn)}</div>', len(drawn)


def _picture(cell: Cell) -> str:
    mark = {True: "✓ ", False: "✗ ", None: ""}[cell.correct]
    words = f"<small>{mark}{escape(cell.words)}</small>"
    if cell.pixels is None:
        return f"<div><small>no picture</small>{words}</div>"
    pixels = cell.pixels
    small = max(pixels.shape[:2]) <= SMALL_PICTURE
    image = (
        Image.fromarray(pixels) if small else resize_picture(pixels, min(THUMBNAIL, max(pixels.shape[:2])))
    )
    data = io.BytesIO()
    if small:
        image.save(data, "WEBP", lossless=True, quality=20, method=1)  # effort: more is slow, and saves 4%
    else:
        image.save(data, "WEBP", quality=80)
    source = "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
    kind = 'class="pixels" ' * small
    drawn = (
        f'<img {kind}src="{source}" width="{image.width}" height="{image.height}" '
        f'alt="{escape(mark + cell.words)}">'
    )
    if cell.link:
        drawn = f'<a href="{escape(cell.link)}">{drawn}</a>'
    return f"<div>{drawn}{words}</div>"
