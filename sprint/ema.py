"""An exponential moving average of a network's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """shadow ← decay · shadow + (1 − decay) · weights, in float32 or wider, from the weights at creation.

    model   the bare network (no DDP wrapper): weights are matched by name
    decay   per update, in [0, 1); 0 follows the weights exactly
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay must be in [0, 1), not {decay}")
        self.decay = decay
        self.shadow = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, moved: Tensor | None = None) -> None:
        """Once per optimizer step of `model`.

        moved   a bool scalar on the weights' device: False leaves the average as it is, to the bit.
                None is True. The host does not read it.
        """
        weight = dict.fromkeys({s.dtype for s in self.shadow.values()}, 1 - self.decay)
        if moved is not None:
            weight = {dtype: share * moved.to(dtype) for dtype, share in weight.items()}
        for name, p in model.named_parameters():
            shadow = self.shadow[name]
            shadow.lerp_(p.to(shadow.dtype), weight[shadow.dtype])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights of `model` with the average, in their own dtype."""
        for name, p in model.named_parameters():
            p.copy_(self.shadow[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` holds the average; outside, its own weights again, whatever happened inside."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        try:
            self.copy_to(model)
            yield
        finally:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(own[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The shadow by parameter name, sharing memory. The decay is the recipe's, not the state's."""
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError naming the first parameter that `state` lacks or has too many."""
        if different := sorted(self.shadow.keys() ^ state.keys()):
            raise ValueError(f"EMA state does not match the network: {different[0]!r} is on one side only")
        for name, shadow in self.shadow.items():
            shadow.copy_(state[name])
