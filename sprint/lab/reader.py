"""Does a picture show what its caption says? Read from pixels alone, scored in GenEval's six categories.

`read` finds the objects; `holds` checks a `Claim` of `sprint.lab.scenes` against them. The rules are GenEval's
(arXiv 2310.11513), but for one that is stricter: our captions name every object of their scene, so a picture with
more objects than its caption names is wrong, or one picture that shows everything would suit most captions.
Scribbles that are no shape are seen and count as objects, but satisfy nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from sprint.base.errors import SprintError
from sprint.lab.scenes import (
    BACKGROUND,
    CATEGORIES,
    COLORS,
    RADIUS,
    SHAPES,
    SIZE,
    Claim,
    Noun,
    Thing,
    render,
)

try:
    from scipy import ndimage
except ImportError as error:
    raise SprintError("scoring pictures needs scipy: pip install 'sprint-distill[eval]'") from error

RULES = "shapes and colours from pixels, by GenEval's rules; more objects than the caption names fail"
MIN_AREA = 16  # pixels; a core smaller than this is a speck
MIN_RADIUS = 5.0  # pixels; an object smaller than this is too small to have a shape
HALO = 2.5  # pixels from an object's core in which its soft edge lies
MAX_COLOR_ERROR = 60.0  # Euclidean RGB distance, of 255·√3
MIN_IOU = 0.85  # overlap with the ideal outline below which an object has no shape
MAX_WAIST = 0.5  # of its height: a patch that is no wider in the middle may be two objects that touch
LARGE = sum(RADIUS.values()) / 2  # pixels; a larger radius is "large", a smaller one "small"
POSITION_MARGIN = 0.1  # of both objects' extents together, as in GenEval
POSITION_COSINE = 0.5  # "left of" reaches 60° up and down, as in GenEval


@dataclass(frozen=True)
class Seen:
    """One object found. `shape`, `color`: None where it is like none; `x`, `y`, `radius` in pixels."""

    shape: str | None
    color: str | None
    x: float
    y: float
    radius: float


def read(picture: np.ndarray) -> list[Seen]:
    """The objects of a picture, uint8 [64, 64, 3]. Raises SprintError on any other array."""
    if picture.shape != (SIZE, SIZE, 3) or picture.dtype != np.uint8:
        raise SprintError(
            f"scene reader: got {picture.dtype} {list(picture.shape)}; give uint8 [{SIZE}, {SIZE}, 3]"
        )
    seen = []
    for color, mask in _objects(picture.astype(float)):
        whole = _fit(mask, color)
        halves = [_fit(half, color) for half in _halves(mask)] if whole.shape is None else []
        seen += halves if halves and all(half.shape for half in halves) else [whole]
    return seen


def holds(picture: np.ndarray, claim: Claim) -> bool:
    """Whether the picture, uint8 [64, 64, 3], shows what the claim says."""
    return check(read(picture), claim)


def true_of(things: Iterable[Thing], claim: Claim) -> bool:
    """Whether a scene's own objects make the claim true: the answer a perfect reader gives."""
    return check([Seen(t.shape, t.color, t.x, t.y, t.radius) for t in things], claim)


def check(seen: list[Seen], claim: Claim) -> bool:
    """Whether the claim holds of these objects, and there is nothing else.

    Every noun has as many objects as it counts, of its shape, and of its colour and its size where they are named;
    where a relation is, some pair of such objects stands in it.
    """
    if len(seen) > sum(noun.count for noun in claim.nouns):
        return False
    matches = [[s for s in seen if _is(s, noun)] for noun in claim.nouns]
    if any(len(found) < noun.count for found, noun in zip(matches, claim.nouns, strict=True)):
        return False
    if claim.relation:
        first, second = matches
        return any(claim.relation in _relations(a, b) for a in first for b in second)
    return True


def score(pictures: Iterable[np.ndarray], claims: Iterable[Claim]) -> dict:
    """Share of pictures whose claim holds.

    Returns {"mean_over_samples", "mean_over_categories" (GenEval's overall score), "n",
    "categories": {name: {"share", "n"}}}; categories without a sample are left out. Raises SprintError
    when there is nothing to score; ValueError when pictures and claims differ in number.
    """
    verdicts: dict[str, list[bool]] = {name: [] for name in CATEGORIES}
    for picture, claim in zip(pictures, claims, strict=True):
        verdicts[claim.category].append(holds(picture, claim))
    shares = {k: {"share": float(np.mean(v)), "n": len(v)} for k, v in verdicts.items() if v}
    if not shares:
        raise SprintError("scene score: there is no picture to score; give at least one")
    return {
        "mean_over_samples": float(np.mean([ok for v in verdicts.values() for ok in v])),
        "mean_over_categories": float(np.mean([c["share"] for c in shares.values()])),
        "n": sum(c["n"] for c in shares.values()),
        "categories": shares,
    }


def _is(seen: Seen, noun: Noun) -> bool:
    size = "large" if seen.radius > LARGE else "small"
    return seen.shape == noun.shape and noun.color in (None, seen.color) and noun.size in (None, size)


def _relations(a: Seen, b: Seen) -> set[str]:
    """How `a` stands to `b`, as GenEval decides: offset of centres less a margin, within 60° of the axis."""
    offset = np.array([a.x - b.x, a.y - b.y])
    margin = POSITION_MARGIN * 2 * (a.radius + b.radius)
    dx, dy = np.sign(offset) * np.maximum(abs(offset) - margin, 0) / max(np.hypot(*offset), 1e-9)
    told = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return {relation for relation, cosine in told.items() if cosine > POSITION_COSINE}


def _objects(picture: np.ndarray) -> Iterable[tuple[str | None, np.ndarray]]:
    """Colour and soft mask [H, W] in [0, 1] of each object.

    An object's core is a connected patch of one palette colour that a 3×3 brush can paint; edges, where
    colours mix, belong to the nearest core.
    """
    palette = np.array([BACKGROUND, *COLORS.values()], float)
    nearest = np.linalg.norm(picture[:, :, None] - palette, axis=-1).argmin(-1)
    cores = np.zeros(nearest.shape, int)
    for k in range(1, len(palette)):
        patches = ndimage.label(ndimage.binary_opening(nearest == k, np.ones((3, 3))))[0]
        cores += np.where(patches > 0, patches + cores.max(), 0)
    cores[np.isin(cores, np.flatnonzero(np.bincount(cores.ravel()) < MIN_AREA))] = 0
    if not cores.any():
        return
    distance, (row, column) = ndimage.distance_transform_edt(cores == 0, return_indices=True)
    owner = np.where(distance <= HALO, cores[row, column], 0)
    for core in np.unique(cores[cores > 0]):
        inside = cores == core
        interior = ndimage.binary_erosion(inside)
        color = np.median(picture[interior if interior.any() else inside], axis=0)
        mask = _coverage(picture, color) * (owner == core)
        if (mask > 0.5).sum() >= MIN_AREA:
            yield _name(color), mask


def _name(color: np.ndarray) -> str | None:
    error = {name: np.linalg.norm(color - rgb) for name, rgb in COLORS.items()}
    best = min(error, key=error.get)
    return best if error[best] <= MAX_COLOR_ERROR else None


def _coverage(picture: np.ndarray, color: np.ndarray) -> np.ndarray:
    """How far each pixel is from the background (0) to the colour (1)  -> [H, W]"""
    axis = color - BACKGROUND
    return np.clip((picture - BACKGROUND) @ axis / (axis @ axis), 0.0, 1.0)


def _fit(mask: np.ndarray, color: str | None) -> Seen:
    """The ideal outline with the mask's area and centroid that overlaps it best, if any does well."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    area = mask.sum()
    cx, cy = (x * mask).sum() / area, (y * mask).sum() / area
    best, best_iou = Seen(None, color, float(cx), float(cy), float(np.sqrt(area / np.pi))), MIN_IOU
    for shape in SHAPES:
        unit_area, unit_x, unit_y = _unit(shape)
        r = np.sqrt(area / unit_area)
        fitted = Seen(shape, color, float(cx - unit_x * r), float(cy - unit_y * r), float(r))
        iou = _iou(mask > 0.5, _outline(shape, fitted.x, fitted.y, fitted.radius) > 0.5)
        if r >= MIN_RADIUS and iou >= best_iou:
            best, best_iou = fitted, iou
    return best


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def _outline(shape: str, x: float, y: float, r: float) -> np.ndarray:
    picture = render((Thing(shape, "black", x, y, r),))
    return _coverage(picture.astype(float), np.array(COLORS["black"], float))


@cache
def _unit(shape: str) -> tuple[float, float, float]:
    """Area and centroid (x, y) of a shape of radius 1 around its centre."""
    r, centre = 28.0, SIZE / 2
    mask = _outline(shape, centre, centre, r)
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5 - centre
    area = mask.sum()
    return area / r**2, (x * mask).sum() / area / r, (y * mask).sum() / area / r


def _halves(mask: np.ndarray) -> list[np.ndarray]:
    """The mask cut through its middle, if it has a waist there: equal objects of one colour may touch."""
    rows, columns = ndimage.find_objects((mask > 0.5).astype(int))[0]
    height, width = rows.stop - rows.start, columns.stop - columns.start
    if height > width:
        return [half.T for half in _halves(mask.T)]
    middle = (columns.start + columns.stop) / 2
    waist = (mask[:, int(middle)] > 0.5).sum()
    left = np.arange(SIZE) + 0.5 < middle
    return [mask * left, mask * ~left] if waist <= MAX_WAIST * height else []
