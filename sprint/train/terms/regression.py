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
from sprint.train.terms.consistency import stored_point


def regression_term(student: Callable, batch: Traced, clock: Clock) -> tuple[Tensor, Logged]:
    """mean[ (f_θ(x_t, t) − x_end)² ] / σ_d²; the batch's trajectories have one state each, and end at its latents."""
    point = stored_point(batch)
    with clock.part("student"):
        x_hat = point.x_t / SIGMA_DATA
        F, logvar = student(x_hat, point.t, batch.text, batch.mask, batch.trajectory.guidance)
    x_0 = data_estimate(point.x_t, F, point.t)
    loss = losses.end_point_loss(x_0, SIGMA_DATA * batch.latent)
    # + 0 · logvar: every weight gets a gradient, or DDP would wait for those that have none
    return loss + 0.0 * logvar.sum(), {"loss_end": loss}
