"""An exponential moving average of a network's weights."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """shadow ← decay · shadow + (1 − decay) · weights, in float32 or wider, from the weights at creation.

    weights   by name, as this process holds them: in pieces if they are, and the average then is too
    decay     per update, in [0, 1); 0 follows the weights exactly
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay must be in [0, 1), not {decay}")
        self.decay = decay
        self.shadow: dict[str, Tensor] = {
            name: w.detach().to(torch.promote_types(w.dtype, torch.float32), copy=True)
            for name, w in weights.items()
        }

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], moved: Tensor | None = None) -> None:
        """Once per optimizer step.

        moved   a bool scalar on the weights' device: False leaves the average as it is, to the bit.
                None is True. The host does not read it.
        """
        for name, shadow in self.shadow.items():
            weight = weights[name].detach().to(shadow.dtype)
            # a share of zero would not do: zero times NaN is NaN
            shadow.lerp_(weight if moved is None else torch.where(moved, weight, shadow), 1 - self.decay)
