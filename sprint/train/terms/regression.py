"""From any state of a teacher's trajectory in one step to its end: a distilled sampler's plainest target.

Luhman and Luhman (arXiv 2101.02388) regress a student from noise onto what the teacher's sampler makes of it; here
the states on the way serve too, each with the same end.
"""

from collections.abc import Callable

from torch import Tensor

from sprint.base.clock import Clock
from sprint.data.batch import Traced
from sprint.maths import losses
from sprint.maths.trigflow import SIGMA_DATA, data_estimate
from sprint.train.terms import Logged
from sprint.train.terms.consistency import Point, stored_point


def regression_term(student: Callable, batch: Traced, clock: Clock) -> tuple[Tensor, Logged]:
    """The distance of a pass of its own; the batch's trajectories have one state each, and end at its latents."""
    point = stored_point(batch)
    with clock.part("student"):
        x_hat = point.x_t / SIGMA_DATA
        F, logvar = student(x_hat, point.t, batch.text, batch.mask, batch.trajectory.guidance)
    loss, seen = end_point_distance(F, point, batch)
    # + 0 · logvar: every weight gets a gradient, or DDP would wait for those that have none
    return loss + 0.0 * logvar.sum(), seen


def end_point_distance(F: Tensor, point: Point, batch: Traced) -> tuple[Tensor, Logged]:
    """mean[ (f_θ(x_t, t) − x_end)² ] / σ_d², f_θ the data estimate of what the student said, F."""
    loss = losses.end_point_loss(data_estimate(point.x_t, F, point.t), SIGMA_DATA * batch.latent)
    return loss, {"loss_end": loss}
