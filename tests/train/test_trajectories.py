"""Stage 2 on the states of whole trajectories: which it takes, what it computes there, and that no teacher is asked."""

import math

import pytest
import torch

from sprint.data.batch import Traced, Trajectory
from sprint.engine.batches import take
from sprint.maths import losses
from sprint.maths.schedule import teacher_times
from sprint.maths.trigflow import (
    HALF_PI,
    SIGMA_DATA,
    data_estimate,
    diffuse,
    gaussian_consistency,
    gaussian_velocity,
    velocity_from_data,
)
from sprint.recipe.schema import Recipe, Trajectories
from sprint.train.checks import needs_teacher
from sprint.train.distill import DistillStage
from sprint.train.draws import draw
from sprint.train.states import at_states, choose, spread
from sprint.train.terms.consistency import teacher_velocity
from sprint.train.terms.regression import regression_term
from tests.tiny import LATENT, same, snapshot, tiny_batch, tiny_network, tiny_null
from tests.tolerance import assert_all_close, near, of_network, rounding, sampling
from tests.train.test_distill import D, G, gradients, make_recipe

STEPS = 4
TIMES = torch.tensor(teacher_times(STEPS)[:-1])


def on_states(states: int = 2, regression: float = 1.0, consistency: float = 1.0, **changes) -> Recipe:
    changes = {"adversarial": 0.0, "ema_decay": 0.0} | changes
    recipe = make_recipe(consistency=consistency, regression=regression, **changes)
    recipe.distill.trajectories = Trajectories(states, STEPS)
    return recipe


def make_stage(engine, recipe: Recipe) -> DistillStage:
    return DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)


def traced(count: int, seed: int = 0) -> Traced:
    """Random states and velocities, from pure noise on, at scales 1, 2, 3, …"""
    generator = torch.Generator().manual_seed(7 + seed)
    shape = (count, STEPS, *LATENT)
    states, velocity = (torch.randn(shape, generator=generator) for _ in range(2))
    guidance = torch.arange(1.0, count + 1)
    path = Trajectory(SIGMA_DATA * states, SIGMA_DATA * velocity, TIMES.expand(count, -1), guidance)
    return Traced(*tiny_batch(count, seed), path)


# ---- which states -------------------------------------------------------------------------------------


def test_states_are_chosen_by_seed_and_step_and_none_twice():
    recipe = on_states(states=3, batch_size=300)
    chosen = choose(recipe, 5, STEPS)
    torch.manual_seed(99)
    assert chosen.shape == (100, 3) and torch.equal(chosen, choose(recipe, 5, STEPS))
    assert all(len({*row}) == 3 and row == sorted(row) and max(row) < STEPS for row in chosen.tolist())
    for other in (choose(recipe, 6, STEPS), choose(on_states(states=3, batch_size=300, seed=1), 5, STEPS)):
        assert not torch.equal(chosen, other)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_pure_noise_is_among_them_with_its_probability(probability):
    recipe = on_states(states=2, batch_size=4000)
    recipe.distill.trajectories.max_time_probability = probability
    with_noise = (choose(recipe, 0, STEPS) == 0).any(1).float().mean().item()
    spread_of_one = math.sqrt(probability * (1 - probability))
    assert with_noise == pytest.approx(probability, abs=sampling(spread_of_one, 2000) + 1e-9)
    others = choose(recipe, 0, STEPS).flatten()
    counts = torch.bincount(others[others > 0], minlength=STEPS)[1:].float()
    share = (2 - probability) / 3  # of each other state, in one trajectory
    assert (counts / 2000).tolist() == pytest.approx([share] * 3, abs=sampling(0.5, 2000))


def test_where_all_are_taken_pure_noise_is_one_of_them():
    recipe = on_states(states=STEPS)
    recipe.distill.trajectories.max_time_probability = 0.0
    assert choose(recipe, 0, STEPS).tolist() == [[*range(STEPS)]] * 2


def test_every_state_is_a_sample_with_its_own_text_time_and_scale():
    batch, chosen = traced(4), torch.tensor([[0, 2], [1, 3], [0, 1], [2, 3]])
    samples = at_states(batch, chosen, group=2)
    order = [(0, 0), (1, 1), (0, 2), (1, 3), (2, 0), (3, 2), (2, 1), (3, 3)]  # two of a group side by side
    for place, (which, state) in enumerate(order):
        assert torch.equal(samples.text[place], batch.text[which])
        assert torch.equal(samples.mask[place], batch.mask[which])
        assert torch.equal(samples.latent[place], batch.latent[which])
        path = samples.trajectory
        assert torch.equal(path.states[place, 0], batch.trajectory.states[which, state])
        assert torch.equal(path.velocity[place, 0], batch.trajectory.velocity[which, state])
        assert path.t[place, 0] == TIMES[state] and path.guidance[place] == which + 1


def test_processes_meet_the_samples_that_one_would():
    recipe = on_states(adversarial=0.5, batch_size=16)
    recipe.distill.adversarial.neighbours = 2
    whole = spread(recipe, 3, traced(8), range(8))
    for mine, samples in ((range(4), range(8)), (range(4, 8), range(8, 16))):
        part = spread(recipe, 3, take(traced(8), mine), mine)
        expected = take(whole, samples)
        assert all(torch.equal(a, b) for a, b in zip(part[:3], expected[:3], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(part.trajectory, expected.trajectory, strict=True))


# ---- terms --------------------------------------------------------------------------------------------


def test_scm_on_stored_velocities_is_scm_with_the_teacher_at_the_same_states(engine):
    recipe = on_states(states=1)
    recipe.distill.trajectories.states = 0
    taught = make_stage(engine, recipe)
    recipe = on_states(states=1, regression=0.0)
    stage = make_stage(engine, recipe)
    stage.student.load_state_dict(taught.student.state_dict())
    batch, draws = tiny_batch(), draw(recipe, G, LATENT)
    guided = taught.with_null(batch)
    x_t = diffuse(SIGMA_DATA * batch.latent, draws.noise, draws.t)
    with torch.no_grad():
        velocity = teacher_velocity(taught.teacher, x_t, draws, guided)
    path = Trajectory(x_t[:, None], velocity[:, None], draws.t[:, None], draws.guidance)
    stored, seen = stage.stored_term(Traced(*batch, path), None, draws)
    expected, expected_seen = taught.consistency_term(batch, guided, draws)
    tolerance = of_network(stage.student, passes=4)
    assert stored.item() == near(expected.item(), tolerance)
    assert seen["tangent_norm"].item() == near(expected_seen["tangent_norm"].item(), tolerance)
    stored.backward()
    expected.backward()
    assert_all_close(gradients(stage.student), gradients(taught.student), tolerance)


def test_scm_at_pure_noise_is_finite_and_says_nothing(engine):
    stage = make_stage(engine, on_states(states=1, regression=0.0))
    batch = at_states(traced(8), torch.zeros(8, 1, dtype=torch.long), 1)
    assert (batch.trajectory.t == torch.tensor(HALF_PI)).all()
    loss, seen = stage.stored_term(
        batch, None, draw(stage.recipe, G, LATENT)._replace(guidance=batch.trajectory.guidance)
    )
    loss.backward()
    assert loss.item() == 0 and all(torch.isfinite(value) for value in seen.values())
    assert all(gradient is None or not gradient.any() for gradient in gradients(stage.student).values())


def test_regression_is_zero_for_the_exact_student_of_gaussian_data(engine):
    """From any state of the flow's own path f(x_t, t) is its end; a student that stays where it is misses it."""
    a, (noise,) = 0.2, (SIGMA_DATA * torch.randn(1, 5, *LATENT, generator=torch.Generator().manual_seed(0)))
    t = torch.linspace(0.3, HALF_PI, 5)
    end = gaussian_consistency(noise, torch.full((5,), HALF_PI), a)
    x_t = (
        end * torch.sqrt((a * torch.cos(t)) ** 2 + (SIGMA_DATA * torch.sin(t)) ** 2)[:, None, None, None] / a
    )
    velocity = SIGMA_DATA * gaussian_velocity(x_t, t, a)
    path = Trajectory(x_t[:, None], velocity[:, None], t[:, None], torch.ones(5))
    batch = Traced(end / SIGMA_DATA, *tiny_batch(5)[1:], path)

    def student_of(f):
        def student(x_hat, t, text, mask, guidance):
            x_t = SIGMA_DATA * x_hat
            return velocity_from_data(x_t, f(x_t, t), t), torch.zeros_like(t)

        return student

    clock = make_stage(engine, on_states()).clock
    exact, seen = regression_term(student_of(lambda x_t, t: gaussian_consistency(x_t, t, a)), batch, clock)
    size = (end / SIGMA_DATA).square().mean().item()
    assert exact.item() < (rounding(torch.float32, steps=20) / math.sin(0.3)) ** 2 * size * 10
    lazy, _ = regression_term(student_of(lambda x_t, t: x_t), batch, clock)
    assert lazy.item() == near(
        ((x_t - end) / SIGMA_DATA).square().mean().item(), rounding(torch.float32, terms=320, steps=20)
    )
    assert seen["loss_end"] == exact and lazy.item() > 0.1


def test_regression_is_the_mean_square_distance_to_the_end_with_its_weight(engine):
    stage = make_stage(engine, on_states(regression=3.0))
    batch = at_states(traced(4), choose(stage.recipe, 0, STEPS), 1)
    draws = draw(stage.recipe, G, LATENT)._replace(guidance=batch.trajectory.guidance)
    loss, _ = stage.regression_term(batch, None, draws)
    path = batch.trajectory
    with torch.no_grad():
        x_t, t = path.states[:, 0], path.t[:, 0]
        F = stage.student(x_t / SIGMA_DATA, t, batch.text, batch.mask, path.guidance)
        distance = data_estimate(x_t, F, t) / SIGMA_DATA - batch.latent
    assert loss.item() == near(3.0 * distance.square().mean().item(), of_network(stage.student))
    loss.backward()
    assert stage.student.logvar.weight.grad is not None  # DDP waits for every gradient


def test_regression_beside_scm_is_the_sum_of_both_from_one_pass(engine, monkeypatch):
    found, passes = {}, []
    for name, weights in {"both": (3.0, 2.0), "scm": (0.0, 2.0), "end": (3.0, 0.0)}.items():
        stage = make_stage(engine, on_states(regression=weights[0], consistency=weights[1]))
        batch = at_states(traced(4), choose(stage.recipe, 0, STEPS), 1)
        draws = draw(stage.recipe, G, LATENT)._replace(guidance=batch.trajectory.guidance)
        stage.student.register_forward_hook(lambda *given, name=name: passes.append(name))
        (term,) = stage.student_terms()[:1]
        loss, seen = term(batch, None, draws)
        loss.backward()
        found[name] = loss.item(), gradients(stage.student), seen
    both, scm, end = found["both"], found["scm"], found["end"]
    tolerance = of_network(stage.student, passes=4)
    assert both[0] == near(scm[0] + end[0], tolerance, abs(scm[0]) + abs(end[0]))
    total = {key: scm[1][key] + end[1][key] for key in both[1] if both[1][key] is not None}
    assert_all_close({key: both[1][key] for key in total}, total, tolerance)
    assert both[2].keys() == scm[2].keys() | end[2].keys() and passes.count("both") == 1


# ---- updates ------------------------------------------------------------------------------------------


def test_the_teacher_is_asked_only_by_those_who_need_it():
    assert needs_teacher(make_recipe().distill) and needs_teacher(make_recipe(adversarial=0.0).distill)
    assert not needs_teacher(on_states().distill) and not needs_teacher(on_states(consistency=0.0).distill)
    assert needs_teacher(on_states(adversarial=0.5).distill)


def test_an_update_without_a_teacher_learns(engine):
    stage = make_stage(engine, on_states())
    assert not hasattr(stage, "teacher") and stage.reads == 4 and stage.kinds == 1
    before, read = snapshot(stage.student), []
    for step in range(6):
        read.append(stage.update(step, traced(4, seed=step % 2)).read(engine))
    assert {"loss_scm", "loss_end", "grad_norm"} <= read[0].keys() and read[0]["skipped"] == 0
    assert not same(before, snapshot(stage.student))
    assert read[4]["loss_end"] < read[0]["loss_end"]


def test_the_teacher_is_let_go(engine):
    import weakref

    adapted = tiny_network()
    stage = DistillStage(on_states(), engine, adapted, tiny_null(), LATENT)
    there = weakref.ref(adapted)
    del adapted
    assert there() is None and stage.student is not None


@pytest.mark.parametrize("adversarial", [0.0, 0.5])
def test_an_update_in_parts_is_the_update_of_the_whole(engine, adversarial):
    found = []
    for size in (0, 4):
        recipe = on_states(adversarial=adversarial, micro_batch_size=size, batch_size=16)
        stage = make_stage(engine, recipe)
        means = stage.update(G, traced(8)).read(engine)
        found.append((gradients(stage.student), means["loss_end"], means["loss_scm"]))
    (whole, *losses), (parts, *others) = found
    tolerance = of_network(tiny_network(), passes=8)
    assert others == [near(loss, tolerance) for loss in losses]
    assert_all_close(parts, whole, tolerance)


def test_the_scale_that_the_student_is_told_is_the_trajectory_s(engine, monkeypatch):
    stage, told = make_stage(engine, on_states()), []
    forward = stage.student.forward

    def noted(x_hat, t, text, mask, guidance):
        told.append(guidance)
        return forward(x_hat, t, text, mask, guidance)

    monkeypatch.setattr(stage.student, "forward", noted)
    stage.update(G, traced(4))
    assert [guidance.tolist() for guidance in told] == [[1, 1, 2, 2, 3, 3, 4, 4]]  # one pass for both terms


def test_ladd_looks_at_the_end_point_beside_it(engine):
    stage = make_stage(engine, on_states(adversarial=0.5, batch_size=16, self_consistency=1.0))
    stage.recipe.distill.adversarial.neighbours = 4
    read = stage.update(G, traced(8)).read(engine)
    assert {"loss_scm", "loss_end", "loss_adv", "loss_self"} <= read.keys()
    read = stage.update(D, traced(8)).read(engine)
    assert {"logit_real", "logit_fake"} <= read.keys() and read["skipped"] == 0


@pytest.mark.parametrize("t", [0.02, 0.156, 1.2])
def test_velocities_stored_in_bf16_do_not_bias_the_tangent(t):
    """Student and teacher differ by 3% of the velocity, along the flow's circle; 32³ numbers as in Sana's latents."""
    generator = torch.Generator().manual_seed(0)
    count, shape = 8, (8, 32, 32, 32)

    def normal() -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def tangent(D: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        times = torch.full((count,), t, dtype=torch.float64)
        return losses.normalise_tangent(losses.consistency_tangent(F, F_prime, D, x_t, times, 1.0))

    x_t, D = SIGMA_DATA * normal(), SIGMA_DATA * normal()
    F = D / SIGMA_DATA + 0.03 * normal()
    F_prime = math.cos(t) * math.sin(t) * (0.03 * normal() - x_t / SIGMA_DATA)
    exact, stored = tangent(D, x_t), tangent(D.bfloat16().double(), x_t.bfloat16().double())
    length = (stored * exact).sum() / exact.square().sum()
    error = stored - length * exact
    assert length == pytest.approx(1, abs=0.002) and error.norm() < 0.06 * exact.norm()
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(error.numel())  # four deviations of a mean
