"""One picture of many: a row for each caption, a column for each way of sampling."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 128  # pixels, width and height of each picture
GAP = 10  # pixels between pictures
CAPTION_WIDTH = 210  # pixels
MARGIN = 28  # pixels round it all
HEADER = 46  # pixels above the first row, for two lines of title
TEXT = 15  # pixels, size of type
LEADING = 20  # pixels from line to line
PAPER, INK, MUTED = (255, 255, 255), (28, 30, 33), (104, 109, 115)


def grid_size(rows: int, columns: int) -> tuple[int, int]:
    """(width, height) in pixels of `picture_grid`."""
    width = 2 * MARGIN + CAPTION_WIDTH + columns * (GAP + CELL)
    return width, 2 * MARGIN + HEADER + rows * CELL + (rows - 1) * GAP


def picture_grid(
    titles: Sequence[tuple[str, str]], captions: Sequence[str], pictures: Sequence[Sequence[np.ndarray]]
) -> Image.Image:
    """Draw the grid.

    titles [columns] of two lines each; captions [rows]; pictures [columns][rows] of uint8 [H, W, 3].
    Captions stand left of their row, wrapped and, if need be, cut at the row's height.
    """
    sheet = Image.new("RGB", grid_size(len(captions), len(titles)), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(TEXT)
    for row, caption in enumerate(captions):
        _write_caption(draw, font, caption, MARGIN + HEADER + row * (CELL + GAP))
    for column, (title, subtitle) in enumerate(titles):
        x = MARGIN + CAPTION_WIDTH + GAP + column * (CELL + GAP)
        draw.text((x, MARGIN), title, fill=INK, font=font)
        draw.text((x, MARGIN + LEADING), subtitle, fill=MUTED, font=font)
        for row, picture in enumerate(pictures[column]):
            sheet.paste(resize_picture(picture, CELL), (x, MARGIN + HEADER + row * (CELL + GAP)))
    return sheet


def resize_picture(picture: np.ndarray, size: int) -> Image.Image:
    """uint8 [H, W, 3] -> at most size × size, aspect ratio kept; whole pixels where it is enlarged."""
    image = Image.fromarray(picture)
    scale = size / max(image.size)
    target = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(target, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _write_caption(draw, font, caption: str, top: int) -> None:
    """At most as many lines as the row holds, centred on it."""
    lines = _wrap(caption, font, CAPTION_WIDTH - GAP)
    room = CELL // LEADING
    if len(lines) > room:
        lines = [*lines[: room - 1], lines[room - 1] + " …"]
    y = top + (CELL - LEADING * len(lines)) / 2
    for number, line in enumerate(lines):
        draw.text((MARGIN, y + number * LEADING), line, fill=INK, font=font)


def _wrap(text: str, font, width: float) -> list[str]:
    """Greedy lines no wider than `width` pixels; a longer word is broken."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = lines[-1] or word
        while font.getlength(lines[-1]) > width:
            cut = next(n for n in range(len(lines[-1]), 0, -1) if font.getlength(lines[-1][:n]) <= width)
            lines += [lines[-1][cut:]]
            lines[-2] = lines[-2][:cut]
    return lines
