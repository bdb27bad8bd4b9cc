"""One optimizer step over gradients that are already there, and what to do when they are not finite.

Nothing here reads the device but `Means.read`: the host can queue an update while the last one is at work.
"""

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

    A gradient norm that is not finite skips the update, on the device, and is counted there; the step, its
    phase and its place in the schedule are still over. After `PATIENCE` in a row `Means.read` stops the run.
    """

    def __init__(self, module: nn.Module, settings: Optimizer, engine: Engine, updates: int):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.settings, self.engine = settings, engine
        self.optimizer = build_optimizer(self.parameters, settings)
        self.schedule = learning_rate_schedule(self.optimizer, settings, updates)
        self.skipped, self.skipped_in_a_row = torch.zeros(2, dtype=torch.long, device=engine.device)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> tuple[Tensor, Tensor]:
        """Average, clip, update.  -> gradient norm before the clip, whether the weights moved

        Both are scalars on the device, not to be read in the loop.
        """
        self.engine.average_gradients(self.parameters)
        norm = clip_gradients(self.parameters, self.settings.clip_norm)
        moved = torch.isfinite(norm)
        self.optimizer.found_inf = moved.logical_not().float()
        self.optimizer.step()
        self.schedule.step()
        self.skipped = self.skipped + ~moved
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * ~moved
        return norm, moved

    def state_dict(self) -> dict:
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: Mapping) -> None:
        fused = [group["fused"] for group in self.optimizer.param_groups if "fused" in group]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, flag in zip(self.optimizer.param_groups, fused, strict=False):
            group["fused"] = flag  # of this machine, not of the one that saved
        self.schedule.load_state_dict(state["schedule"])
        self.skipped = torch.as_tensor(state["skipped"], device=self.engine.device)
        self.skipped_in_a_row = torch.as_tensor(state["skipped_in_a_row"], device=self.engine.device)


class Means:
    """Weighted means of scalars over the parts of a batch, kept on the device until they are read."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.skipped_in_a_row = torch.zeros(())

    def add(self, share: float, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + share * value.detach().float()

    def note_update(self, norm: Tensor, updater: Updater) -> None:
        """The gradient norm of the update that `updater` has just made, and what it has skipped so far."""
        self.add(1.0, grad_norm=norm, skipped=updater.skipped)
        self.skipped_in_a_row = updater.skipped_in_a_row

    def read(self, engine: Engine) -> dict[str, float]:
        """All of them, averaged over processes: the one place that waits for the device.

        Raises SprintError if this update was at least the `PATIENCE`-th in a row without a finite gradient.
        Only logged updates are read, so a run may go on for 2 · `log_every` steps before it hears of it.
        """
        values = [value.to(engine.device).float() for value in (*self.sums.values(), self.skipped_in_a_row)]
        *means, in_a_row = engine.average(torch.stack(values)).tolist()
        if in_a_row >= PATIENCE:
            raise SprintError(
                f"{in_a_row:.0f} updates in a row without a finite gradient; "
                "lower the learning rate, and give the run another name"
            )
        return dict(zip(self.sums, means, strict=True))
