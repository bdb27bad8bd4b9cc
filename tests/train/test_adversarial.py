"""LADD's choices beside the paper's hinge: pairs, penalties by a little noise, heads that begin before the student."""

import math

import pytest
import torch

from sprint.maths import losses
from sprint.maths.trigflow import SIGMA_DATA
from sprint.recipe.schema import AdversarialLoss, NormGroups, Renoising
from sprint.train import distill
from sprint.train.draws import Draws, draw
from sprint.train.terms import adversarial as terms
from sprint.train.terms.sample import Sample, one_step_sample
from tests.tiny import LATENT, same, snapshot, tiny_batch
from tests.tolerance import near, of_network, rounding, sampling
from tests.train.test_distill import D, G, make_recipe, make_stage
from tests.train.test_distill_state import exact_stage, gradients, update_of


def stage_with(engine, **settings):
    stage = make_stage(engine)
    for name, value in settings.items():
        setattr(stage.settings.adversarial, name, value)
    return stage


# ---- pairs ----------------------------------------------------------------------------------------------


def heads_in_order(features, group):
    """[B, 1]: what the sample is, whoever stands beside it."""
    return features[0]


def level(x_hat, t, text, mask):
    return [x_hat.flatten(1).mean(1, keepdim=True)]


@torch.no_grad()
@pytest.mark.parametrize("groups", NormGroups)
def test_pairs_are_a_real_and_a_generated_sample_of_one_prompt(engine, groups, monkeypatch):
    """Levels without noise: real k, generated −k; the misaligned one of k is a neighbour's."""
    stage = stage_with(engine, norm_groups=groups, loss=AdversarialLoss.relativistic)
    draws = draw(stage.recipe, D, LATENT)
    draws = draws._replace(renoise_t=torch.zeros_like(draws.renoise_t))
    real = torch.arange(8.0)
    batch = tiny_batch()._replace(latent=real[:, None, None, None].expand(8, *LATENT))
    sample = Sample(-SIGMA_DATA * batch.latent, *[torch.zeros(8)] * 3)
    monkeypatch.setattr(terms, "one_step_sample", lambda *_: sample)
    told = (batch, draws, stage.settings, stage.clock)
    _, seen = terms.sample_term(None, level, heads_in_order, *told)
    exact = rounding(torch.float32, terms=64, steps=4)
    assert seen["loss_adv"].item() == near(torch.nn.functional.softplus(2 * real).mean().item(), exact)
    loss, _ = terms.discriminator_term(
        None, level, heads_in_order, batch, draws, stage.settings.adversarial, stage.clock
    )
    neighbour = real[[3, 0, 1, 2, 7, 4, 5, 6]]
    apart = torch.cat([2 * real, real - neighbour])
    assert loss.item() == near(torch.nn.functional.softplus(-apart).mean().item(), exact)


@pytest.mark.parametrize("step", [G, D])
@pytest.mark.parametrize("groups", NormGroups)
def test_a_stage_trains_in_pairs_and_differs(engine, step, groups):
    stages = [stage_with(engine, loss=loss, norm_groups=groups) for loss in AdversarialLoss]
    found = [stage.update(step, tiny_batch()).read(engine)["loss"] for stage in stages]
    assert all(map(math.isfinite, found)) and found[0] != found[1]


# ---- penalties --------------------------------------------------------------------------------------------


def slope(x_hat, t, text, mask):
    return [x_hat.flatten(1) @ torch.linspace(-1, 1, x_hat[0].numel())[:, None]]


@torch.no_grad()
def test_penalties_of_linear_heads_are_the_square_of_their_slope(engine, monkeypatch):
    """D(x̂) = w·x̂, so a latent moved by sigma·n moves it by cos t · sigma · w·n: both penalties and their weights."""
    count = 2000
    recipe = make_recipe(batch_size=count)
    settings = recipe.distill.adversarial
    settings.r1, settings.r2, settings.sigma, settings.misaligned_pairs = 3.0, 5.0, 0.1, False
    settings.taps = (0,)
    batch, draws = tiny_batch(count), draw(recipe, D, LATENT)
    assert draws.nearby_noise.shape == (count, 2, *LATENT)
    monkeypatch.setattr(
        terms, "one_step_sample", lambda *_: Sample(torch.ones(count, *LATENT), *[torch.zeros(count)] * 3)
    )
    clock = make_stage(engine).clock
    loss, seen = terms.discriminator_term(None, slope, heads_in_order, batch, draws, settings, clock)
    w = torch.linspace(-1, 1, math.prod(LATENT))
    cosine = torch.cos(draws.renoise_t[:, 0])
    exact = rounding(torch.float32, terms=len(w), steps=4) / settings.sigma
    for k, name in enumerate(("loss_r1", "loss_r2")):
        moved = settings.sigma * cosine * (draws.nearby_noise[:, k].flatten(1) @ w)
        assert seen[name].item() == near(moved.square().mean().item(), exact)
        expected = (settings.sigma * cosine).square().mean().item() * w.square().sum().item()
        spread = (2 * cosine.pow(4).mean()).sqrt() / cosine.square().mean()  # a χ² each, with its own weight
        assert seen[name].item() == near(expected, sampling(spread.item(), count))
    by_hand = hinge_of(batch, draws) + 3 * seen["loss_r1"].item() + 5 * seen["loss_r2"].item()
    assert loss.item() == near(by_hand, exact)


def hinge_of(batch, draws) -> float:
    """Of the same samples by itself."""
    real, fake = (
        slope(terms.diffuse(x, draws.renoise_noise[:, 0], draws.renoise_t[:, 0]) / SIGMA_DATA, *[None] * 3)[0]
        for x in (SIGMA_DATA * batch.latent, torch.ones_like(batch.latent))
    )
    return losses.discriminator_hinge_loss(real, fake).item()


@pytest.mark.parametrize("renoising", Renoising)
def test_a_sample_and_its_neighbour_meet_the_same_time_and_noise(engine, monkeypatch, renoising):
    stage = stage_with(engine, r1=1.0, r2=1.0, renoising=renoising)
    batch, draws, seen = tiny_batch(), draw(stage.recipe, D, LATENT), []
    original = terms.renoised_features

    def noted(tapped, x_0, draws, batch, kind):
        seen.append((kind, x_0))
        return original(tapped, x_0, draws, batch, kind)

    monkeypatch.setattr(terms, "renoised_features", noted)
    stage.heads_term(batch, draws)
    assert [kind for kind, _ in seen] == [0, 1, 2, 0, 1]
    spread = SIGMA_DATA * stage.settings.adversarial.sigma
    for near_by, kind in ((3, 0), (4, 1)):
        assert torch.equal(seen[near_by][1], seen[kind][1] + spread * draws.nearby_noise[:, kind])


def test_one_penalty_alone_has_the_first_noise(engine):
    stage = stage_with(engine, r2=1.0)
    read = stage.update(D, tiny_batch()).read(engine)
    assert read["loss_r2"] > 0 and "loss_r1" not in read
    assert stage.settings.adversarial.looks == 4


@pytest.mark.parametrize("loss", AdversarialLoss)
def test_penalised_heads_in_parts_are_those_of_the_whole(engine, true_float64, monkeypatch, loss):
    monkeypatch.setattr(distill, "draw", lambda *of: Draws(*(tensor.double() for tensor in draw(*of))))
    reads, found = [], []
    for size in (0, 4):
        stage = exact_stage(engine, micro_batch_size=size, batch_size=10)
        for name, value in {"r1": 2.0, "r2": 1.0, "loss": loss}.items():
            setattr(stage.settings.adversarial, name, value)
        read = stage.update(D, tiny_batch(10, dtype=torch.float64)).read(engine)
        reads.append(read)
        found.append(gradients(stage.heads))
    tolerance = update_of(stage) / stage.settings.adversarial.sigma
    assert reads[1].keys() == reads[0].keys() >= {"loss_r1", "loss_r2"}
    for name, value in reads[0].items():
        assert reads[1][name] == near(value, tolerance, max(1.0, abs(value))), name
    for name, gradient in found[0].items():
        scale = gradient.abs().max().clamp_min(1.0)
        assert (found[1][name] - gradient).abs().max() <= tolerance * scale, name


# ---- the heads begin first ----------------------------------------------------------------------------------


def test_the_student_does_not_hear_the_heads_while_they_warm_up(engine):
    """Two of its updates are those of sCM alone, bit for bit; the heads learn all the while."""
    warm, without = stage_with(engine, warmup_steps=2), make_stage(engine, adversarial=0.0)
    heads = snapshot(warm.heads)
    for round_ in range(2):
        read = warm.update(2 * round_, tiny_batch(seed=round_)).read(engine)
        assert "loss_adv" not in read
        warm.update(2 * round_ + 1, tiny_batch(seed=7))
        draws = draw(without.recipe, 2 * round_, LATENT)
        without._update_student(tiny_batch(seed=round_), draws)
    assert same(snapshot(warm.student), snapshot(without.student)) and not same(heads, snapshot(warm.heads))
    assert "loss_adv" in warm.update(4, tiny_batch()).read(engine)


def test_self_consistency_does_not_wait_for_the_heads(engine):
    """Alone it is what the term of both adds for it."""
    stage, batch = stage_with(engine, warmup_steps=1), tiny_batch()
    stage.settings.self_consistency = 3.0
    draws, guided = draw(stage.recipe, G, LATENT), stage.with_null(batch)
    assert stage.student_terms() == [stage.consistency_term, stage.self_consistency_term]
    loss, seen = stage.self_consistency_term(batch, guided, draws)
    stage.generator_updates = 1
    assert stage.student_terms() == [stage.consistency_term, stage.sample_term]
    both, told = stage.sample_term(batch, guided, draws)
    exact = rounding(torch.float32, steps=3)
    assert seen == {"loss_self": told["loss_self"]}
    assert loss.item() == near(3 * seen["loss_self"].item(), exact)
    assert both.item() == near(
        loss.item() + 0.5 * told["loss_adv"].item(), exact, scale=both.abs().item() + 1
    )
    stage.generator.trained.zero_grad()
    loss.backward()
    assert all(gradient is not None for gradient in gradients(stage.student).values())


def test_the_defaults_are_the_papers(engine):
    """A hinge on the samples of one step, nothing else: by hand."""
    stage, batch = make_stage(engine), tiny_batch()
    draws = draw(stage.recipe, G, LATENT)
    loss, seen = stage.sample_term(batch, None, draws)
    with stage.heads.frozen():
        sample = one_step_sample(stage.generator.trained, batch, draws).x_0
        logits = terms.logits_beside_real(stage.tapped, stage.heads, batch, draws, sample, 4, stage.clock)
    assert seen["loss_adv"].item() == near(
        -logits.mean().item(), of_network(stage.student, passes=2), scale=1
    )
    assert loss.item() == near(0.5 * seen["loss_adv"].item(), rounding(torch.float32, steps=2))
    assert draws.nearby_noise.shape == (8, 0, *LATENT)
