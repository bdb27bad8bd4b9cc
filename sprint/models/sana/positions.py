"""What an original file's position table tells: the picture size it was made for, and how positions are spaced.

Sana for 2K and 4K adds sines and cosines of a token's column and row. Original files may carry that table as
`pos_embed`, or a table of zeros; diffusers' class computes it from `sample_size` and `interpolation_scale`.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from torch import Tensor

from sprint.base.errors import SprintError
from sprint.models.teacher import Shape

TABLE = "pos_embed"
FIRST_WEIGHTS = ("x_embedder.proj.weight", "patch_embed.proj.weight")
POSITION_GRID = 64  # latent cells a side from which on Sana adds positions: 2K pictures and larger


def config_of_size(sample_size: int) -> dict:
    """Of a public teacher for so many latent cells a side: 64 (2K) spaced by 1, 128 (4K) by 1/2."""
    spaced = sample_size / POSITION_GRID if sample_size >= POSITION_GRID else None
    return {"sample_size": sample_size, "interpolation_scale": spaced}


def told_by_extras(
    given: Mapping, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]
) -> tuple[dict, tuple[str, ...]]:
    """As `Teacher.told_by_extras`: a table that is not the one computed from what it tells is an error."""
    shape = shapes.get(TABLE, ())
    patches = [shapes[name] for name in FIRST_WEIGHTS if len(shapes.get(name, ())) == 4]
    if len(shape) != 3 or not patches or shape[2] % 4 or not shape[2]:
        return {}, ()  # the check of shapes says what is wrong
    side, patch = math.isqrt(shape[1]), patches[0][2]
    size = side * patch
    if side * side != shape[1] or not side:
        raise SprintError(f"{TABLE} has {shape[1]} places, which are no square")
    if size < POSITION_GRID and given.get("interpolation_scale") is None:
        return {} if given.get("sample_size") else {"sample_size": size}, ()
    if given.get("sample_size", size) != size:
        raise SprintError(
            f"{TABLE} is of {size} latent cells a side, but sample_size is {given['sample_size']}"
        )
    if given.get("interpolation_scale", size) is None:  # a config that says: no positions
        return {}, ()
    return {"sample_size": size, "interpolation_scale": _spacing(read(TABLE), side, size, given)}, (TABLE,)


def _spacing(table: Tensor, side: int, size: int, given: Mapping) -> float:
    """The interpolation scale whose table this is."""
    table = table.view(side, side, 2, -1)  # row, column, of column or row, sine and cosine
    if not table.any():
        return given.get("interpolation_scale") or config_of_size(size)["interpolation_scale"]
    errors = {scale: _error(table, scale) for scale in _candidates(table, size, given)}
    best = min(errors, key=errors.get)
    # angles of up to `side` computed in float32, then rounded to the table's dtype
    allowed = side * torch.finfo(torch.float32).eps + torch.finfo(table.dtype).eps
    if not errors[best] <= allowed:
        raise SprintError(
            f"{TABLE} is not the table that Sana computes: it is {errors[best]:.1e} off at best "
            f"(interpolation_scale {best:g}); give its diffusers folder"
        )
    return best


def _candidates(table: Tensor, size: int, given: Mapping) -> Iterator[float]:
    """As a config says; else the public ones, and what the angle of the second column says."""
    if given.get("interpolation_scale") is not None:
        yield given["interpolation_scale"]
        return
    yield from {1.0, config_of_size(size)["interpolation_scale"] or 1.0}
    second = table[0, min(1, table.shape[1] - 1), 0].double()
    angle = math.atan2(second[0], second[len(second) // 2])
    if math.isfinite(angle) and angle > 1 / 64:
        yield 1 / angle
        yield round(8 / angle) / 8 or 1.0


def _error(table: Tensor, scale: float) -> float:
    """The largest difference from the table that diffusers' class computes; NaN counts as infinite."""
    side = table.shape[0]
    ours = get_1d_sincos_pos_embed_from_grid(
        table.shape[-1], torch.arange(side, dtype=torch.float32) / scale, output_type="pt"
    ).float()
    worst = max(
        max((row[:, 0] - ours).abs().max().item(), (row[:, 1] - ours[number]).abs().max().item())
        for number, row in enumerate(each.float() for each in table)
    )
    return worst if math.isfinite(worst) else math.inf
