"""What every data source gives, and the one thing that every training step takes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Sample(NamedTuple):
    """picture: uint8 [H, W, 3], RGB; caption: never empty."""

    picture: np.ndarray
    caption: str


class Trajectory(NamedTuple):
    """K states of the guided teacher's way from pure noise to a picture, which is its batch's or sample's `latent`.

    states    [B, K, C, h, w], x_t = σ_d · x_hat; the first of a whole way is pure noise, t = π/2
    velocity  [B, K, C, h, w], D = dx_t/dt = σ_d · F there, F guided
    t         [B, K], TrigFlow times in radians, falling
    guidance  [B], the scale

    Of one sample, the same without B.
    """

    states: Tensor
    velocity: Tensor
    t: Tensor
    guidance: Tensor


class Encoded(NamedTuple):
    """A sample that the family has seen already, on the CPU.

    latent [C, h, w]: scaling_factor · autoencoder(picture); text [T, D]: its real tokens alone
    """

    latent: Tensor
    text: Tensor
    trajectory: Trajectory | None = None


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


class Traced(NamedTuple):
    """A `Batch` with the trajectories that end at its latents."""

    latent: Tensor
    text: Tensor
    mask: Tensor
    trajectory: Trajectory


def flat(tensors: tuple) -> dict[str, Tensor]:
    """Every tensor of a named tuple and of those in it, by its name."""
    found: dict[str, Tensor] = {}
    for name, value in tensors._asdict().items():
        found |= flat(value) if isinstance(value, tuple) else {} if value is None else {name: value}
    return found


def parts(size: int, largest: int) -> Iterator[slice]:
    """Cut `size` samples into runs of at most `largest` (0: no cut)."""
    step = largest or size
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
