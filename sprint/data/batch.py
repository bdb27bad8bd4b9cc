"""The one thing every data source gives and every training step takes."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """latent [B, C, h, w]: scaling_factor · autoencoder(picture); text [B, T, D]; mask [B, T], 1 = token."""

    latent: Tensor
    text: Tensor
    mask: Tensor
