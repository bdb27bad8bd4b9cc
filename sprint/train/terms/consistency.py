"""sCM: the student's total derivative along the teacher's flow (Algorithm 1; sCM, arXiv 2410.11081)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sprint.base.clock import Clock
from sprint.data.batch import Batch, Traced
from sprint.maths import losses
from sprint.maths.dual import value_and_tangent
from sprint.maths.trigflow import SIGMA_DATA, diffuse
from sprint.models.guidance import GuidedText, guided_velocity
from sprint.recipe.schema import Consistency
from sprint.train.draws import Draws
from sprint.train.terms import Logged


def teacher_velocity(teacher: Callable, x_t: Tensor, draws: Draws, guided: GuidedText) -> Tensor:
    """D = σ_d · (F_u + w (F_c − F_u)) = dx_t/dt along the guided teacher's flow."""
    return SIGMA_DATA * guided_velocity(teacher, x_t / SIGMA_DATA, draws.t, guided, draws.guidance)


class Point(NamedTuple):
    """Where sCM looks: x_t [B, C, h, w] at time t [B], and D = dx_t/dt [B, C, h, w] of the guided teacher there."""

    x_t: Tensor
    t: Tensor
    D: Tensor


def teacher_point(teacher: Callable, batch: Batch, draws: Draws, guided: GuidedText, clock: Clock) -> Point:
    """The noised data, and what the teacher says there.

    guided  the batch's prompts and as many null prompts
    """
    x_t = diffuse(SIGMA_DATA * batch.latent, draws.noise, draws.t)
    with clock.part("teacher"), torch.no_grad():
        return Point(x_t, draws.t, teacher_velocity(teacher, x_t, draws, guided))


def stored_point(batch: Traced) -> Point:
    """The state of each trajectory, of one state each, with the velocity that drew it: no teacher is asked again.

    TBCM's thrift (arXiv 2511.20410).
    """
    path = batch.trajectory
    return Point(path.states[:, 0], path.t[:, 0], path.velocity[:, 0])


class Pass(NamedTuple):
    """What the student says at a point: F with its graph, F' = its total derivative along D times cos t · sin t, both
    [B, C, h, w], and its log-variance [B].
    """

    F: Tensor
    F_prime: Tensor
    logvar: Tensor


def dual_pass(student: Callable, point: Point, batch: Batch, guidance: Tensor, clock: Clock) -> Pass:
    """Value and tangent in one forward.  guidance [B], with which the teacher's D was made"""
    logvar = None

    def F_theta(x_hat, t):
        nonlocal logvar
        F, logvar = student(x_hat, t, batch.text, batch.mask, guidance)
        return F

    with clock.part("student"):
        v = losses.tangent_inputs(point.t, point.D)
        F, F_prime = value_and_tangent(F_theta, point.x_t / SIGMA_DATA, point.t, *v)
    return Pass(F, F_prime, logvar)


def consistency_term(said: Pass, point: Point, r: float, settings: Consistency) -> tuple[Tensor, Logged]:
    """L_sCM.  (Algorithm 1; sCM, arXiv 2410.11081, Eq. 8)

    r   the tangent's warm-up, 0 to 1
    """
    F, F_prime, logvar = said
    F_minus = F.detach()
    g = losses.consistency_tangent(F_minus, F_prime, point.D, point.x_t, point.t, r)
    if settings.normalise_tangent:
        g = losses.normalise_tangent(g, settings.tangent_normalisation)
    loss = losses.consistency_loss(F, F_minus, g, logvar, point.t)
    tangent_norm = torch.linalg.vector_norm(F_prime, dim=(1, 2, 3)).mean()
    return loss, {"loss_scm": loss, "tangent_norm": tangent_norm, "logvar": logvar.mean()}
