"""The student's own sample in one step, which LADD looks at, and what a second step makes of it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sprint.base.clock import Clock
from sprint.data.batch import Batch
from sprint.maths import losses
from sprint.maths.trigflow import SIGMA_DATA, data_estimate, diffuse, noise_estimate
from sprint.train.draws import Draws
from sprint.train.terms import Logged


class Sample(NamedTuple):
    """x̂_0 = f_θ(x_t, t) in one step from x_t, the network's output F on the way, and its log-variance [B]."""

    x_0: Tensor
    x_t: Tensor
    F: Tensor
    logvar: Tensor


def one_step_sample(student: Callable, batch: Batch, draws: Draws) -> Sample:
    """From the noised data at t = start_t, or from pure noise where that is π/2 (max-time weighting, §3.3)."""
    x_t = diffuse(SIGMA_DATA * batch.latent, draws.start_noise, draws.start_t)
    F, logvar = student(x_t / SIGMA_DATA, draws.start_t, batch.text, batch.mask, draws.guidance)
    return Sample(data_estimate(x_t, F, draws.start_t), x_t, F, logvar)


@torch.no_grad()
def second_step(student: Callable, sample: Sample, batch: Batch, draws: Draws) -> Tensor:
    """f_θ(x_s, s) with x_s on the circle through the sample and the noise that its own F tells, s = second_t."""
    s = draws.second_t
    noise = noise_estimate(sample.x_t, sample.F, draws.start_t) / SIGMA_DATA
    x_s = diffuse(sample.x_0, noise, s)
    F, _ = student(x_s / SIGMA_DATA, s, batch.text, batch.mask, draws.guidance)
    return data_estimate(x_s, F, s)


def self_consistency_term(
    student: Callable, batch: Batch, draws: Draws, clock: Clock
) -> tuple[Tensor, Logged]:
    """The distance of a one-step sample from what a second step makes of it, where no heads look at the sample."""
    with clock.part("student"):
        sample = one_step_sample(student, batch, draws)
        distance = losses.self_consistency_loss(sample.x_0, second_step(student, sample, batch, draws))
    # + 0 · logvar: every weight gets a gradient, or DDP would wait for those that have none
    return distance + 0.0 * sample.logvar.sum(), {"loss_self": distance}
