"""The one thing every data source gives and every training step takes."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """latent [B, C, h, w]: scaling_factor · autoencoder(picture); text [B, T, D]; mask [B, T], 1 = token."""

    latent: Tensor
    text: Tensor
    mask: Tensor


def parts(size: int, largest: int) -> Iterator[slice]:
    """Cut `size` samples into runs of at most `largest` (0: no cut)."""
    step = largest or size
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
