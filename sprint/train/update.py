"""One optimizer step over gradients that are already there, and what to do when they, or the weights, are not finite.

    Updater    clips, steps the optimizer and its learning rate, and counts the steps it had to skip
    Means      sums what is logged over micro-batches, on the device

Only `Means.read` waits for the device. All else is queued, so that the GPU never waits for Python.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from sprint.base.errors import Diverged
from sprint.base.finite import check_finite
from sprint.engine.engine import Engine
from sprint.engine.held import Held, Read, Tensors
from sprint.engine.optim import learning_rate_schedule

PATIENCE = 20  # updates in a row that may be skipped before the run stops


class Updater:
    """Updates a module's weights on its learning-rate schedule of `updates` steps.

    Where the gradient norm is not finite the weights stay as they are, and a counter on the device goes up. The
    schedule moves on all the same. After `PATIENCE` such updates in a row `Means.read` stops the run, and at once
    where the weights themselves are not finite.
    """

    def __init__(self, trained: Held, engine: Engine, updates: int):
        self.trained, self.engine = trained, engine
        self.schedule = learning_rate_schedule(trained.optimizer, trained.settings, updates)
        self.skipped = torch.zeros((), dtype=torch.long, device=engine.device)
        self.skipped_in_a_row = torch.zeros_like(self.skipped)
        self.broken_at = torch.zeros_like(
            self.skipped
        )  # the update after which weights were not finite; 0 is none

    @property
    def updates(self) -> int:
        """Made so far, skipped ones too."""
        return self.schedule.last_epoch

    def step(self) -> tuple[Tensor, Tensor]:
        """Clip, update.  -> gradient norm before the clip, whether the weights moved and are finite

        Both are scalars on the device, not to be read in the loop.
        """
        norm, moved = self.trained.update()
        self.schedule.step()
        self.skipped = self.skipped + ~moved
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * ~moved
        finite = _all_finite(self.trained.local().values())
        first = (self.broken_at == 0) & ~finite
        self.broken_at = self.broken_at + first * self.updates
        return norm, moved & finite

    def check(self) -> None:
        """Before weights leave. Raises Diverged where they are not finite. Collective; waits for the device."""
        if at := self.engine.max_over_ranks(int(self.broken_at)):
            raise Diverged(_broken(at))

    def check_moved(self) -> None:
        """After the last update. Raises Diverged where there were updates and none was taken; waits for the device."""
        if self.updates and int(self.skipped) == self.updates:
            raise Diverged(
                f"none of the {self.updates} updates had a finite gradient, so the weights never moved; "
                "look at the data (`bad_samples.jsonl`) and the teacher, or lower the learning rate"
            )

    def tensors(self) -> Tensors:
        """What a checkpoint holds of it: weights, optimizer state, counters; the schedule is in `facts`. Collective."""
        return self.trained.tensors() | self._counts()

    def facts(self) -> dict:
        return {"schedule": self.schedule.state_dict()}

    def load(self, read: Read, facts: dict) -> None:
        """Collective. Raises SprintError for weights that are not finite."""
        self.trained.load(read)
        read(self._counts())
        check_finite(self.trained.local().items(), "checkpoint")
        self.schedule.load_state_dict(facts["schedule"])
        rates = self.schedule.get_last_lr()
        for group, rate in zip(self.trained.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _counts(self) -> Tensors:
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}


def _all_finite(weights: Iterable[Tensor]) -> Tensor:
    """A bool scalar on the device: by the largest absolute value, which overflows nowhere."""
    held = [weight for weight in weights if weight.numel()]  # shards may be empty
    return get_total_norm(held, math.inf).isfinite() if held else torch.tensor(True)


def _broken(at: int) -> str:
    last = f"number {at - 1}" if at > 1 else "none"
    return (
        f"the weights are not finite after update {at}; the last good update was {last}; "
        "lower the learning rate, and give the run another name"
    )


def under(prefix: str, read: Read) -> Read:
    """A reader for one of several updaters in a checkpoint: "weight" is read as "PREFIX.weight"."""
    return lambda tensors: read(prefixed(prefix, tensors))


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    """The same under "PREFIX.NAME", or as they are where the prefix is empty."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()} if prefix else tensors


class Means:
    """Weighted means of scalars over the parts of a batch, kept on the device until they are read."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.skipped_in_a_row = self.broken_at = torch.zeros(())
        self.updates = 0

    def add(self, share: float, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + share * value.detach().float()

    def note_update(self, norm: Tensor, updater: Updater) -> None:
        """The gradient norm of the update that `updater` has just made, and what it has skipped so far."""
        self.add(1.0, grad_norm=norm, skipped=updater.skipped)
        self.skipped_in_a_row, self.broken_at = updater.skipped_in_a_row, updater.broken_at
        self.updates = updater.updates

    def read(self, engine: Engine) -> dict[str, float]:
        """All of them, averaged over processes: the one place that waits for the device.

        Raises Diverged if this update was at least the `PATIENCE`-th in a row without a finite gradient, or if weights
        are not finite. Only logged updates are read: a run may go on for 2 · `log_every` steps before it hears of it.
        """
        counts = self.skipped_in_a_row, (self.broken_at > 0)
        values = [value.to(engine.device).float() for value in (*self.sums.values(), *counts)]
        *means, in_a_row, broken = engine.average(torch.stack(values)).tolist()
        if broken:
            raise Diverged(_broken(engine.max_over_ranks(int(self.broken_at))))
        if in_a_row >= PATIENCE:
            raise Diverged(
                f"{in_a_row:.0f} updates in a row without a finite gradient; "
                f"the last good update was number {self.updates - in_a_row:.0f}; "
                "lower the learning rate, and give the run another name"
            )
        return dict(zip(self.sums, means, strict=True))
