"""What every data source gives, and the one thing that every training step takes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Sample(NamedTuple):
    """picture: uint8 [H, W, 3], RGB; caption: never empty."""

    picture: np.ndarray
    caption: str


class Encoded(NamedTuple):
    """A sample that the family has seen already, on the CPU.

    latent [C, h, w]: scaling_factor · autoencoder(picture); text [T, D]: its real tokens alone
    """

    latent: Tensor
    text: Tensor


class Prompt(NamedTuple):
    """A caption without a picture, and its position, from which the noise that becomes its picture is drawn."""

    caption: str
    position: int


Item = Sample | Encoded | Prompt


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
