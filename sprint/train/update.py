"""One optimizer step over gradients that are already there, and what to do when they are not finite."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sprint.engine import Engine
from sprint.errors import SprintError
from sprint.optim import build_optimizer, clip_gradients, learning_rate_schedule
from sprint.recipe import Optimizer

PATIENCE = 20  # updates in a row that may be skipped before the run stops


class Updater:
    """A module's optimizer, learning rate schedule over its `updates`, and gradient clipping.

    A gradient norm that is not finite skips the update and is counted; the step and its phase are still
    over. After `PATIENCE` in a row: SprintError.
    """

    def __init__(self, module: nn.Module, settings: Optimizer, engine: Engine, updates: int):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.settings, self.engine = settings, engine
        self.optimizer = build_optimizer(self.parameters, settings)
        self.schedule = learning_rate_schedule(self.optimizer, settings, updates)
        self.skipped, self.skipped_in_a_row = 0, 0

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> tuple[Tensor, bool]:
        """Average, clip, update.  -> gradient norm before the clip, whether the weights moved"""
        self.engine.average_gradients(self.parameters)
        norm = clip_gradients(self.parameters, self.settings.clip_norm)
        moved = bool(torch.isfinite(norm))
        if moved:
            self.optimizer.step()
            self.schedule.step()
        self.skipped += not moved
        self.skipped_in_a_row = 0 if moved else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= PATIENCE:
            raise SprintError(
                f"{PATIENCE} updates in a row without a finite gradient; lower the learning rate and resume"
            )
        return norm, moved

    def state_dict(self) -> dict:
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: Mapping) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]


class Means:
    """Weighted means of scalars over the parts of a batch, kept on the device until they are read."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}

    def add(self, share: float, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + share * value.detach().float()

    def read(self, engine: Engine) -> dict[str, float]:
        return {name: engine.average(value).item() for name, value in self.sums.items()}
