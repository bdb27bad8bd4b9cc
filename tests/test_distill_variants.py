"""Stage 2 without one of its parts, as the ablations run it."""

import pytest
import torch

from sprint.models.view import DENSE_TIME, SPARSE_TIME
from sprint.train.distill import DistillStage, draw, teacher_velocity
from sprint.trigflow import SIGMA_DATA, diffuse, flow_time
from tests.test_distill import make_recipe, make_stage
from tests.tiny import LATENT, tiny_batch, tiny_network, tiny_null


def test_without_normalisation_the_tangent_stands_as_it_is(engine):
    """Before the first update r = 0, and g is its first term alone: −cos² t (σ_d F⁻ − D)."""
    stage = make_stage(engine)
    stage.settings.consistency.normalise_tangent = False
    batch, draws = tiny_batch(), draw(stage.recipe, 0, LATENT)
    loss, _ = stage._consistency_loss(batch, draws, stage.with_null(batch))
    t, x_t = draws.t, diffuse(SIGMA_DATA * batch.latent, draws.noise, draws.t)
    with torch.no_grad():
        v = teacher_velocity(stage.teacher, x_t, draws, stage.with_null(batch))
        F = stage.student(x_t / SIGMA_DATA, t, batch.text, batch.mask, draws.guidance)
        g = -(torch.cos(t)[:, None, None, None] ** 2) * (SIGMA_DATA * F - v)
        logvar = stage.student.log_variance(t, draws.guidance)
        weight = torch.exp(-logvar) / (SIGMA_DATA * torch.tan(t))
        by_hand = (weight * g.square().mean((1, 2, 3)) + logvar).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-4, abs=1e-4)


def test_a_student_in_sparse_time_sees_a_thousand_times_the_time(engine):
    dense, sparse = (
        make_stage(engine),
        DistillStage(make_recipe(), engine, tiny_network(), tiny_null(), LATENT, time_scale=SPARSE_TIME),
    )
    batch, t = tiny_batch(), torch.full((8,), 0.5)
    told = (batch.text, batch.mask, torch.full((8,), 4.5))
    x_hat = torch.randn(8, *LATENT, generator=torch.Generator().manual_seed(0))
    sparse.student.load_state_dict(dense.student.state_dict())
    with torch.no_grad():
        F = sparse.student.view.flow_velocity(x_hat, flow_time(t), *told)
        assert torch.equal(F, dense.student.view.flow_velocity(x_hat, 1000 * flow_time(t), *told))
    assert sparse.teacher.time_scale == SPARSE_TIME and dense.teacher.time_scale == DENSE_TIME
