"""One optimizer step over gradients that are already there, and what to do when they are not finite.

Nothing here reads the device but `Means.read`: the host can queue an update while the last one is at work.
"""

import torch
from torch import Tensor

from sprint.base.errors import Diverged
from sprint.engine.engine import Engine
from sprint.engine.held import Held, Read, Tensors
from sprint.engine.optim import learning_rate_schedule

PATIENCE = 20  # updates in a row that may be skipped before the run stops


class Updater:
    """A trained module's learning rate over its `updates`, and the count of those that did not take place.

    A gradient norm that is not finite skips the update, on the device, and is counted there; the step, its
    phase and its place in the schedule are still over. After `PATIENCE` in a row `Means.read` stops the run.
    """

    def __init__(self, trained: Held, engine: Engine, updates: int):
        self.trained, self.engine = trained, engine
        self.schedule = learning_rate_schedule(trained.optimizer, trained.settings, updates)
        self.skipped = torch.zeros((), dtype=torch.long, device=engine.device)
        self.skipped_in_a_row = torch.zeros_like(self.skipped)

    def step(self) -> tuple[Tensor, Tensor]:
        """Clip, update.  -> gradient norm before the clip, whether the weights moved

        Both are scalars on the device, not to be read in the loop.
        """
        norm, moved = self.trained.update()
        self.schedule.step()
        self.skipped = self.skipped + ~moved
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * ~moved
        return norm, moved

    def tensors(self) -> Tensors:
        """Everything of it that a checkpoint holds, but for the schedule's place. Collective."""
        return self.trained.tensors() | self._counts()

    def facts(self) -> dict:
        return {"schedule": self.schedule.state_dict()}

    def load(self, read: Read, facts: dict) -> None:
        """Collective."""
        self.trained.load(read)
        read(self._counts())
        self.schedule.load_state_dict(facts["schedule"])
        rates = self.schedule.get_last_lr()
        for group, rate in zip(self.trained.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _counts(self) -> Tensors:
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}


def under(prefix: str, read: Read) -> Read:
    """Reads names below `prefix`."""
    return lambda tensors: read(prefixed(prefix, tensors))


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


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

        Raises Diverged if this update was at least the `PATIENCE`-th in a row without a finite gradient.
        Only logged updates are read, so a run may go on for 2 · `log_every` steps before it hears of it.
        """
        values = [value.to(engine.device).float() for value in (*self.sums.values(), self.skipped_in_a_row)]
        *means, in_a_row = engine.average(torch.stack(values)).tolist()
        if in_a_row >= PATIENCE:
            raise Diverged(
                f"{in_a_row:.0f} updates in a row without a finite gradient; "
                "lower the learning rate, and give the run another name"
            )
        return dict(zip(self.sums, means, strict=True))
