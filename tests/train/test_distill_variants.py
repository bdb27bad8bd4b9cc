"""Stage 2 without one of its parts, as the ablations run it, and with the part that the paper has not."""

import torch

from sprint.maths import losses
from sprint.maths.trigflow import (
    HALF_PI,
    SIGMA_DATA,
    diffuse,
    flow_time,
    velocity_from_data,
)
from sprint.models.teacher import DENSE_TIME, SPARSE_TIME
from sprint.train.distill import DistillStage
from sprint.train.draws import draw
from sprint.train.terms import adversarial as terms
from sprint.train.terms.adversarial import logits_beside_real
from sprint.train.terms.consistency import teacher_velocity
from sprint.train.terms.sample import one_step_sample, second_step
from tests.tiny import LATENT, tiny_batch, tiny_network, tiny_null
from tests.tolerance import assert_all_close, assert_close, near, of_network, rounding
from tests.train.test_distill import (
    D,
    G,
    gradients,
    make_recipe,
    make_stage,
)


def test_without_normalisation_the_tangent_stands_as_it_is(engine):
    """Before the first update r = 0, and g is its first term alone: −cos² t (σ_d F⁻ − D)."""
    stage = make_stage(engine)
    stage.settings.consistency.normalise_tangent = False
    batch, draws = tiny_batch(), draw(stage.recipe, 0, LATENT)
    loss, _ = stage.consistency_term(batch, stage.with_null(batch), draws)
    t, x_t = draws.t, diffuse(SIGMA_DATA * batch.latent, draws.noise, draws.t)
    with torch.no_grad():
        v = teacher_velocity(stage.teacher, x_t, draws, stage.with_null(batch))
        F = stage.student(x_t / SIGMA_DATA, t, batch.text, batch.mask, draws.guidance)
        g = -(torch.cos(t)[:, None, None, None] ** 2) * (SIGMA_DATA * F - v)
        logvar = stage.student.log_variance(t, draws.guidance)
        weight = torch.exp(-logvar) / (SIGMA_DATA * torch.tan(t))
        by_hand = (weight * g.square().mean((1, 2, 3)) + logvar).mean()
    assert loss.item() == near(by_hand.item(), of_network(stage.student, passes=2))


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


# ---- a straighter path -------------------------------------------------------------------------------


def elementwise(t: torch.Tensor) -> float:
    """Twenty roundings of a number, and a division by sin t, which rounding of what stands over it grows by."""
    return rounding(torch.float32, steps=20) / torch.sin(t).min().item()


def student_of(f):
    """A student with this f(x_t, t): what it says is the velocity that leads there."""

    def student(x_hat, t, text, mask, guidance):
        x_t = SIGMA_DATA * x_hat
        return velocity_from_data(x_t, f(x_t, t), t), torch.zeros_like(t)

    return student


def test_the_second_step_of_an_exact_student_of_gaussian_data_overshoots():
    """Where data has the deviation σ_d, f(x_t, t) = x_t, and the circle through x_T twice is (cos s + sin s) x_T."""
    batch, draws = tiny_batch(), draw(make_recipe(), G, LATENT)
    draws = draws._replace(start_t=torch.full((8,), HALF_PI))
    exact = student_of(lambda x_t, t: x_t)
    sample = one_step_sample(exact, batch, draws)
    s = draws.second_t[:, None, None, None]
    x_T = SIGMA_DATA * draws.start_noise
    assert_close(sample.x_0, x_T, elementwise(torch.tensor(HALF_PI)))
    expected = (torch.cos(s) + torch.sin(s)) * x_T
    assert_close(second_step(exact, sample, batch, draws), expected, elementwise(draws.second_t))


def test_the_second_step_starts_at_its_own_time_with_the_noise_of_the_first():
    batch, draws, seen = tiny_batch(), draw(make_recipe(), G, LATENT), []
    grown = student_of(lambda x_t, t: t[:, None, None, None].expand_as(x_t))

    def student(x_hat, t, *told):
        seen.append((x_hat, t))
        return grown(x_hat, t, *told)

    sample = one_step_sample(student, batch, draws)
    target = second_step(student, sample, batch, draws)
    (x_t, t), (x_s, s) = seen
    c, d = torch.cos(draws.start_t)[:, None, None, None], torch.sin(draws.start_t)[:, None, None, None]
    noise = (x_t - c * sample.x_0 / SIGMA_DATA) / d
    assert_close(x_s, diffuse(sample.x_0 / SIGMA_DATA, noise, s, 1.0), elementwise(t))
    assert torch.equal(s, draws.second_t) and (s < t).all()
    assert_close(
        target, s[:, None, None, None].expand_as(target), elementwise(s), scale=x_s.abs().max().item()
    )


def test_self_consistency_is_added_with_its_weight_and_its_target_is_fixed(engine):
    plain, with_it = make_stage(engine, consistency=0.0), make_stage(engine, consistency=0.0)
    with_it.settings.self_consistency = 3.0
    batch, draws = tiny_batch(), draw(plain.recipe, G, LATENT)
    (term,) = plain.student_terms()
    before, seen = term(batch, None, draws)
    assert "loss_self" not in seen
    (term,) = with_it.student_terms()
    loss, seen = term(batch, None, draws)
    sample = one_step_sample(with_it.generator.trained, batch, draws)
    target = second_step(with_it.generator.trained, sample, batch, draws)
    distance = losses.self_consistency_loss(sample.x_0, target)
    tolerance = of_network(with_it.student, passes=2)  # the second step stands on the first
    assert seen["loss_self"].item() == near(distance.item(), tolerance) and distance > 1e-3
    assert loss.item() == near(before.item() + 3.0 * distance.item(), tolerance)
    loss.backward()
    found = {name: gradient.clone() for name, gradient in gradients(with_it.student).items()}
    with_it.generator.trained.zero_grad()
    with with_it.heads.frozen():
        logits = logits_beside_real(with_it.tapped, with_it.heads, batch, draws, sample.x_0, 4, with_it.clock)
    by_hand = 0.5 * losses.generator_adversarial_loss(logits)
    (by_hand + 3.0 * ((sample.x_0 - target.detach()) / SIGMA_DATA).square().mean()).backward()
    expected = {
        name: gradient for name, gradient in gradients(with_it.student).items() if gradient is not None
    }
    assert_all_close(
        {name: found[name] for name in expected}, expected, of_network(with_it.student, passes=4)
    )


def test_no_second_step_without_its_weight_nor_for_the_heads(engine, monkeypatch):
    taken = []
    monkeypatch.setattr(terms, "second_step", lambda *of: taken.append(1) or second_step(*of))
    make_stage(engine).update(G, tiny_batch())
    stage = make_stage(engine, self_consistency=1.0)
    stage.update(D, tiny_batch())
    assert not taken
    assert "loss_self" in stage.update(G, tiny_batch()).read(engine)
    assert taken
