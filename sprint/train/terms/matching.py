"""Distribution matching as rCM adds it: the student's samples pulled along the difference of two scores.

Sources: rCM (arXiv 2510.08431, §4), DMD2 (arXiv 2405.14867). The fake score knows the student's own samples, the
guided teacher the data. Neither pictures nor heads are needed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sprint.base.clock import Clock
from sprint.data.batch import Batch
from sprint.maths import losses
from sprint.maths.trigflow import SIGMA_DATA, data_estimate, diffuse, ideal_velocity
from sprint.models.guidance import GuidedText, guided_velocity
from sprint.train.draws import Draws
from sprint.train.terms import Logged


def rollout(student: Callable, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
    """The student's own sample from pure noise; its gradient goes through the last step alone.

    At times t_1 = π/2 > t_2 > ...: x_k = cos t_k · x_0 + sin t_k · σ_d ε_k, x_0 <- f_θ(x_k, t_k).
    -> x_0 [B, C, H, W], the log-variance of the last step [B]
    """
    *before, last = range(draws.own_t.shape[1] - 1)
    x_0 = torch.zeros_like(draws.own_noise[:, 0])
    with torch.no_grad():
        for step in before:
            x_0, _ = _step(student, x_0, step, batch, draws)
    return _step(student, x_0, last, batch, draws)


def _step(student: Callable, x_0: Tensor, step: int, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
    t = draws.own_t[:, step]
    x_t = diffuse(x_0, draws.own_noise[:, step], t)
    F, logvar = student(x_t / SIGMA_DATA, t, batch.text, batch.mask, draws.guidance)
    return data_estimate(x_t, F, t), logvar


def matching_term(
    student: Callable,
    teacher: Callable,
    fake_score: Callable,
    batch: Batch,
    draws: Draws,
    guided: GuidedText,
    clock: Clock,
) -> tuple[Tensor, Logged]:
    """L_DMD of the student's own sample, in units of latents.

    guided  the batch's prompts and as many null prompts
    """
    t, noise = draws.own_t[:, -1], draws.own_noise[:, -1]
    with clock.part("student"):
        x_0, logvar = rollout(student, batch, draws)
    with torch.no_grad():
        x_t = diffuse(x_0, noise, t)
        x_hat = x_t / SIGMA_DATA
        with clock.part("teacher"):
            F = guided_velocity(teacher, x_hat, t, guided, draws.guidance)
            real = data_estimate(x_t, F, t)
        with clock.part("fake score"):
            fake = data_estimate(x_t, fake_score(x_hat, t, batch.text, batch.mask, draws.guidance), t)
    matching = losses.distribution_matching_loss(*(each / SIGMA_DATA for each in (x_0, fake, real)))
    # + 0 · logvar: every weight gets a gradient, or DDP would wait for those that have none
    return matching + 0.0 * logvar.sum(), {"loss_dmd": matching}


def fake_score_term(
    student: Callable, fake_score: Callable, batch: Batch, draws: Draws, clock: Clock
) -> tuple[Tensor, Logged]:
    """mean ‖F_fake − v‖² on the student's own samples, v the velocity between a sample and its noise."""
    t, noise = draws.own_t[:, -1], draws.own_noise[:, -1]
    with clock.part("student"), torch.no_grad():
        x_0, _ = rollout(student, batch, draws)
    x_t = diffuse(x_0, noise, t)
    with clock.part("fake score"):
        F = fake_score(x_t / SIGMA_DATA, t, batch.text, batch.mask, draws.guidance)
    return losses.mean_square_error(F, ideal_velocity(x_0 / SIGMA_DATA, noise, t)), {}
