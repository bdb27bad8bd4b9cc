"""Distribution matching: its gradient against closed forms, its updates, and whose turn it is."""

from collections import Counter

import pytest
import torch

from sprint.base.clock import Clock
from sprint.engine.optim import start_state
from sprint.maths.trigflow import (
    HALF_PI,
    SIGMA_DATA,
    data_estimate,
    diffuse,
    expand_time,
    gaussian_consistency,
    gaussian_velocity,
    velocity_from_data,
)
from sprint.models.guidance import GuidedText, guided_velocity
from sprint.recipe.schema import Matching, Optimizer, TimeDensity
from sprint.train import distill
from sprint.train.distill import DistillStage
from sprint.train.draws import Draws, draw
from sprint.train.terms.matching import fake_score_term, matching_term, rollout
from sprint.train.turns import cycle, turn
from tests.launch import forked
from tests.tiny import LATENT, same, snapshot, tiny_batch, tiny_network, tiny_null
from tests.tolerance import (
    assert_all_close,
    assert_close,
    growing,
    near,
    of_autocast,
    of_network,
    readings,
    rounding,
    sampling,
)
from tests.train.matching_processes import losses_with
from tests.train.test_adapt import load
from tests.train.test_distill import assert_moments, gradients, make_recipe
from tests.train.test_trajectories import traced

G, D, F = 0, 1, 2  # steps of each phase
CLOCK = Clock(torch.device("cpu"))


def recipe_with(rollout: int = 3, rank: int = 0, updates: int = 2, **changes):
    recipe = make_recipe(**changes)
    recipe.distill.steps = 20
    optimizer = recipe.distill.optimizer
    recipe.distill.matching = Matching(0.5, rollout, updates=updates, lora_rank=rank, optimizer=optimizer)
    return recipe


def stage_with(engine, **changes) -> DistillStage:
    return DistillStage(recipe_with(**changes), engine, tiny_network(), tiny_null(), LATENT)


def draws_of(steps: int, dtype: torch.dtype = torch.float64) -> Draws:
    """Of an update whose own samples take so many steps."""
    recipe = recipe_with(rollout=steps)
    found = (draw(recipe, step, LATENT) for step in range(100))
    draws = next(each for each in found if each.own_t.shape[1] == steps + 1)
    return Draws(*(tensor.to(dtype) for tensor in draws))


# ---- draws --------------------------------------------------------------------------------------------


def test_times_fall_from_pure_noise_and_the_last_is_drawn_by_itself():
    recipe = recipe_with(rollout=4, batch_size=20_000)
    recipe.distill.matching.time = TimeDensity(-0.7, 1.6)
    draws = next(d for d in (draw(recipe, step, (1, 1, 1)) for step in range(100)) if d.own_t.shape[1] == 5)
    steps, look = draws.own_t[:, :4].double(), draws.own_t[:, 4].double()
    assert (steps[:, 0] == torch.tensor(HALF_PI)).all() and (steps.diff(dim=1) <= 0).all()
    for t in (steps[:, 1], look):  # the second step is below π/2 whatever is drawn
        assert_moments(torch.log(SIGMA_DATA * torch.tan(t)), -0.7, 1.6)
    both = torch.stack([steps[:, 1], look])
    assert torch.corrcoef(both)[0, 1].abs() < sampling(1, 20_000)
    noise = draws.own_noise.flatten(2).squeeze(2).T
    assert torch.corrcoef(noise).sub(torch.eye(5)).abs().max() < sampling(1, 20_000)


def test_every_number_of_steps_is_equally_likely():
    recipe, n = recipe_with(rollout=4, batch_size=4), 1000
    counts = Counter(draw(recipe, step, (1, 1, 1)).own_t.shape[1] - 1 for step in range(n))
    assert counts.keys() == {1, 2, 3, 4}
    for count in counts.values():
        assert count / n == near(1 / 4, sampling((3 / 16) ** 0.5, n), scale=1)


def test_what_the_others_draw_is_as_without_matching():
    with_it, without = (draw(recipe, 3, LATENT) for recipe in (recipe_with(), make_recipe()))
    for name, tensor in without._asdict().items():
        if not name.startswith("own_"):
            assert torch.equal(tensor, getattr(with_it, name)), name
    assert without.own_t.shape == (8, 0) and without.own_noise.shape == (8, 0, *LATENT)


# ---- the gradient, in closed form -----------------------------------------------------------------------


def gaussian_teacher(a: float):
    """Of data N(0, a²), whatever the prompt."""
    return lambda x_hat, t, *told: gaussian_velocity(SIGMA_DATA * x_hat, t, a)


def moved_student(b: float, shift: torch.Tensor):
    """Draws N(0, b²) in one step, and `shift` on top."""

    def student(x_hat, t, *told):
        x_t = SIGMA_DATA * x_hat
        return velocity_from_data(x_t, gaussian_consistency(x_t, t, b) + shift, t), torch.zeros_like(t)

    return student


def gradient_of_matching(a: float, b: float, fake: float) -> tuple[torch.Tensor, Draws, torch.Tensor]:
    """∂L_DMD/∂x_0 of a student that draws N(0, b²), under scores of N(0, a²) and N(0, fake²).  -> it, draws, x_0"""
    batch, draws = tiny_batch(dtype=torch.float64), draws_of(1)
    guided = GuidedText(torch.cat([batch.text, batch.text]), torch.cat([batch.mask, batch.mask]))
    shift = torch.zeros(8, *LATENT, dtype=torch.float64, requires_grad=True)
    student = moved_student(b, shift)
    loss, seen = matching_term(
        student, gaussian_teacher(a), gaussian_teacher(fake), batch, draws, guided, CLOCK
    )
    assert loss == seen["loss_dmd"]
    loss.backward()
    return shift.grad, draws, rollout(student, batch, draws)[0].detach()


def test_the_gradient_is_the_difference_of_two_gaussian_scores():
    a, b = 0.3, 0.7
    gradient, draws, x_0 = gradient_of_matching(a, b, fake=b)
    t, noise = draws.own_t[:, -1], draws.own_noise[:, -1]
    assert_close(x_0, b * draws.own_noise[:, 0], rounding(torch.float64, steps=20))
    x_t = diffuse(x_0, noise, t)
    c, s = torch.cos(expand_time(t, x_t)), torch.sin(expand_time(t, x_t))

    def score(deviation: float) -> torch.Tensor:
        return -x_t / (deviation**2 * c**2 + SIGMA_DATA**2 * s**2)

    denoised = (x_t + (SIGMA_DATA * s) ** 2 * score(a)) / c  # Tweedie's formula
    distance = (x_0 - denoised).abs().mean((1, 2, 3), keepdim=True)
    difference = (SIGMA_DATA * s) ** 2 / c * (score(b) - score(a))
    expected = 2 * difference / distance / (SIGMA_DATA * x_0.numel())
    tolerance = rounding(torch.float64, terms=64, steps=20) / c.min().item() ** 2
    assert_close(gradient, expected, tolerance)
    # descent narrows a student that is too wide: on the average it points outwards
    assert (gradient * x_0).mean() > 0


def test_the_gradient_vanishes_where_the_distributions_agree():
    gradient, *_ = gradient_of_matching(0.3, 0.3, fake=0.3)
    assert gradient.abs().max() == 0


def test_the_fake_score_is_fit_to_the_students_own_samples():
    """Its loss is least, over all N(0, d²), at what the student draws, and there it is the variance of v given x_t."""
    batch, b = tiny_batch(dtype=torch.float64), 0.7
    student = moved_student(b, torch.zeros(1, dtype=torch.float64))
    losses = {
        d: sum(
            fake_score_term(
                student,
                gaussian_teacher(d),
                batch,
                Draws(*(x.double() for x in draw(recipe_with(rollout=1), step, LATENT))),
                CLOCK,
            )[0].item()
            for step in range(50)
        )
        for d in (0.5, 0.65, 0.7, 0.75, 1.0)
    }
    assert min(losses, key=losses.get) == b


# ---- rollouts -------------------------------------------------------------------------------------------


def test_a_rollouts_gradient_is_that_of_its_last_step_alone(engine):
    stage, batch, draws = stage_with(engine), tiny_batch(), draws_of(3, torch.float32)
    student = stage.generator.trained
    x_0, logvar = rollout(student, batch, draws)
    x_0.square().sum().backward()
    found = {name: g for name, g in gradients(stage.student).items() if g is not None}
    stage.generator.trained.zero_grad()

    def step(x_0, k):
        t = draws.own_t[:, k]
        x_t = diffuse(x_0, draws.own_noise[:, k], t)
        velocity, _ = student(x_t / SIGMA_DATA, t, batch.text, batch.mask, draws.guidance)
        return data_estimate(x_t, velocity, t)

    with torch.no_grad():
        before = step(step(torch.zeros_like(x_0), 0), 1)
    last = step(before, 2)
    assert torch.equal(x_0, last) and logvar.shape == (8,)
    last.square().sum().backward()
    expected = {name: g for name, g in gradients(stage.student).items() if g is not None}
    assert_all_close(found, expected, of_network(stage.student, passes=2))
    stage.generator.trained.zero_grad()
    step(step(step(torch.zeros_like(x_0), 0), 1), 2).square().sum().backward()  # that this can fail
    name = "view.network.proj_out.weight"
    assert (gradients(stage.student)[name] - expected[name]).norm() > 0.01 * expected[name].norm()


def test_autocast_loses_no_gradient_of_a_rollout(engine, bf16_engine):
    """Its first steps cast weights where nothing takes a gradient, and casts are kept."""
    found = []
    for each in (engine, bf16_engine):
        stage, batch = stage_with(each), tiny_batch()
        with each.autocast():
            x_0, _ = rollout(stage.generator.trained, batch, draws_of(2, torch.float32))
        x_0.square().mean().backward()
        found.append({n: g for n, g in gradients(stage.student).items() if g is not None and g.norm() > 0})
    assert found[0].keys() == found[1].keys()
    norms = [torch.stack([g.norm() for g in each.values()]).norm().item() for each in found]
    assert norms[1] == near(norms[0], 3 * of_autocast(stage.student))


# ---- updates --------------------------------------------------------------------------------------------


def test_whose_turn_it_is():
    recipe = recipe_with(updates=2)
    assert "".join(turn(step, recipe.distill) for step in range(9)) == "GDFFGDFFG"
    recipe.distill.adversarial.weight = 0.0
    assert cycle(recipe.distill) == ("G", "F", "F")
    recipe.distill.matching.weight = 0.0
    assert cycle(recipe.distill) == ("G",)


@pytest.mark.parametrize("rank", [0, 2])
def test_each_phase_moves_its_own(engine, rank):
    stage = stage_with(engine, rank=rank)
    assert stage.kinds == 4
    fake_score = stage.fake_score.trained.module
    parts = {"student": stage.student, "heads": stage.heads, "fake": fake_score, "teacher": stage.teacher}
    for step, moves in ((G, "student"), (D, "heads"), (F, "fake"), (F + 1, "fake"), (F + 2, "student")):
        before = {name: snapshot(part) for name, part in parts.items()}
        stage.update(step, tiny_batch(seed=step))
        moved = {name for name, part in parts.items() if not same(before[name], snapshot(part))}
        assert moved == {moves}, step
    assert stage.generator_updates == 2


def test_metrics_and_terms(engine):
    common = {"loss", "grad_norm", "skipped"}
    stage = stage_with(engine)
    read = stage.update(G, tiny_batch()).read(engine)
    assert read.keys() == common | {"loss_scm", "loss_adv", "loss_dmd", "tangent_norm", "logvar"}
    parts = (read["loss_scm"], 0.5 * read["loss_adv"], 0.5 * read["loss_dmd"])
    assert read["loss"] == near(sum(parts), rounding(torch.float32, terms=3), scale=sum(map(abs, parts)))
    assert stage.update(F, tiny_batch()).read(engine).keys() == common
    alone = stage_with(engine, consistency=0.0, adversarial=0.0)
    assert alone.update(0, tiny_batch()).read(engine).keys() == common | {"loss_dmd"}
    assert alone.phase(1) == "F"


def test_every_weight_has_a_gradient_in_each_update(engine):
    """DDP waits for all of them."""
    for rank in (0, 2):
        stage = stage_with(engine, consistency=0.0, adversarial=0.0, rank=rank)
        stage.update(0, tiny_batch())
        assert all(g is not None for g in gradients(stage.student).values())
        stage.update(1, tiny_batch())
        assert all(g is not None for g in gradients(stage.fake_score.trained.module).values())


@torch.no_grad()
def test_the_teacher_is_guided_with_the_samples_scale(engine):
    stage, batch = stage_with(engine), tiny_batch()
    draws, guided = draws_of(1, torch.float32), stage.with_null(batch)
    loss, _ = stage.matching_term(batch, guided, draws)
    x_0, _ = rollout(stage.generator.trained, batch, draws)
    t, noise = draws.own_t[:, -1], draws.own_noise[:, -1]
    x_t = diffuse(x_0, noise, t)
    real = data_estimate(x_t, guided_velocity(stage.teacher, x_t / SIGMA_DATA, t, guided, draws.guidance), t)
    fake = data_estimate(x_t, stage.teacher(x_t / SIGMA_DATA, t, batch.text, batch.mask), t)  # as it begins
    g = (fake - real) / (x_0 - real).abs().mean((1, 2, 3), keepdim=True)
    assert loss.item() == near(0.5 * g.square().mean().item(), 20 * of_network(stage.student, passes=3))


@pytest.mark.parametrize("rank", [0, 2])
def test_state_goes_round_and_training_goes_on_bit_for_bit(engine, rank):
    one = stage_with(engine, rank=rank)
    for step in range(5):
        one.update(step, tiny_batch(seed=step))
    other = stage_with(engine, rank=rank, seed=1)
    other.update(F, tiny_batch(seed=77))
    assert not same(one.tensors(), other.tensors())
    load(other, one)
    other.recipe.seed = one.recipe.seed
    assert any(name.startswith("fake.weights.") for name in one.tensors())
    for stage in (one, other):
        for step in range(5, 9):
            stage.update(step, tiny_batch(seed=step))
    assert same(one.tensors(), other.tensors()) and one.facts() == other.facts()
    assert same(*(snapshot(stage.fake_score.trained.module) for stage in (one, other)))
    assert same(one.ema.shadow, other.ema.shadow)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("step", [G, F])
def test_a_step_in_parts_is_the_step_of_the_whole(engine, true_float64, monkeypatch, step, rank):
    monkeypatch.setattr(distill, "draw", lambda *of: Draws(*(tensor.double() for tensor in draw(*of))))
    reads, found = [], []
    for size in (0, 4):
        recipe = recipe_with(rank=rank, micro_batch_size=size, adversarial=0.0)
        # CAME, for torch's fused AdamW takes no double for what `true_float64` makes of its flag
        recipe.distill.optimizer = recipe.distill.matching.optimizer = Optimizer(clip_norm=1e9)
        stage = DistillStage(recipe, engine, tiny_network().double(), tiny_null(torch.float64), LATENT)
        stage.student.double()
        fake_score = stage.fake_score.trained.module.double()
        for updater in (stage.generator, stage.fake_score):
            updater.trained.optimizer.state.clear()
            start_state(updater.trained.optimizer)
        at = step if step == G else 1  # without heads
        reads.append(stage.update(at, tiny_batch(dtype=torch.float64)).read(engine))
        found.append(gradients(stage.student if step == G else fake_score))
    tolerance = of_network(stage.student, passes=8)
    assert reads[1] == readings(reads[0], tolerance)
    assert_all_close(found[1], found[0], tolerance)


@pytest.mark.parametrize("rank", [0, 2])
def test_activation_checkpointing_changes_nothing(engine, rank):
    reads = []
    for recompute in (False, True):
        stage = stage_with(engine, rank=rank, adversarial=0.0, activation_checkpointing=recompute)
        reads.append([stage.update(step, tiny_batch(seed=step)).read(engine) for step in range(2)])
    tolerance = of_network(stage.student, passes=8)
    for kept, recomputed in zip(*reads, strict=True):
        assert recomputed == readings(kept, tolerance)


CASES = ("ddp:0", "ddp:2", "fsdp2:0", "zero2:0", "zero3:0")


def test_two_processes_are_one(engine, tmp_path):
    pytest.importorskip("deepspeed")
    forked("tests.train.matching_processes", 2, str(tmp_path), *CASES)
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    tolerance = of_network(tiny_network(), passes=8)
    for rank in (0, 2):
        expected = losses_with(engine, rank)
        for case in CASES:
            if case.endswith(f":{rank}"):
                assert found[case] == growing(expected, tolerance), case


def test_it_works_beside_trajectories(engine):
    """Its teacher is asked, whatever the trajectories store; a sample's scale is its trajectory's."""
    recipe = recipe_with(adversarial=0.0, updates=1)
    recipe.distill.trajectories.states, recipe.distill.regression = 2, 1.0
    stage = DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)
    read = stage.update(0, traced(4)).read(engine)
    assert read["loss_dmd"] > 0 and read["loss_end"] > 0 and read["loss_scm"] != 0 and read["skipped"] == 0
    assert stage.update(1, traced(4)).read(engine)["loss"] > 0
