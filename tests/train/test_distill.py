import copy
import math

import pytest
import torch

from sprint.base.errors import SprintError
from sprint.maths import losses
from sprint.maths.trigflow import HALF_PI, SIGMA_DATA, diffuse
from sprint.recipe.schema import AdversarialLoss, NormGroups, NullMask, Renoising
from sprint.train.distill import DISCRIMINATOR, GENERATOR, DistillStage
from sprint.train.draws import draw
from sprint.train.terms import adversarial as terms
from sprint.train.terms import consistency
from sprint.train.terms.consistency import teacher_velocity
from sprint.train.terms.sample import Sample, one_step_sample
from sprint.train.update import PATIENCE
from tests.tiny import LATENT, same, snapshot, tiny_batch, tiny_network, tiny_null, tiny_recipe
from tests.tolerance import assert_close, central, near, of_network, rounding, sampling

G, D = 0, 1  # steps of each phase


def make_recipe(consistency: float = 1.0, adversarial: float = 0.5, **changes):
    recipe = tiny_recipe()
    recipe.distill.consistency.weight = consistency
    recipe.distill.adversarial.weight = adversarial
    for key, value in changes.items():
        setattr(recipe if hasattr(recipe, key) else recipe.distill, key, value)
    return recipe


def make_stage(engine, **changes) -> DistillStage:
    return DistillStage(make_recipe(**changes), engine, tiny_network(), tiny_null(), LATENT)


@pytest.fixture
def stage(engine):
    return make_stage(engine)


def bad_batch():
    return tiny_batch()._replace(latent=torch.full((8, *LATENT), math.nan))


def gradients(module) -> dict:
    return {name: p.grad for name, p in module.named_parameters()}


# ---- draws --------------------------------------------------------------------------------------------


def test_draws_depend_on_seed_and_step_alone():
    recipe = make_recipe()
    first = draw(recipe, 5, LATENT)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(recipe, 5, LATENT), strict=True))
    for other in (draw(make_recipe(seed=1), 5, LATENT), draw(recipe, 6, LATENT)):
        assert not any(torch.equal(a, b) for a, b in zip(first[1:], other[1:], strict=True) if a.numel())


def assert_moments(z: torch.Tensor, mean: float, std: float) -> None:
    assert z.mean().item() == near(mean, sampling(std, len(z)), scale=1)
    assert z.std().item() == near(std, sampling(std / math.sqrt(2), len(z)), scale=1)


def test_draws_have_the_densities_of_the_recipe():
    draws = draw(make_recipe(batch_size=20_000), 0, (1, 1, 1))
    for t, mean, std in ((draws.t, 0.2, 1.6), (draws.renoise_t[:, 0], -0.6, 1.0)):
        z = torch.log(SIGMA_DATA * torch.tan(t.double()))
        assert_moments(z, mean, std)
    at_max = draws.start_t == torch.tensor(HALF_PI)
    assert at_max.float().mean().item() == near(0.5, sampling(0.5, 20_000), scale=1)
    z = torch.log(SIGMA_DATA * torch.tan(draws.start_t[~at_max].double()))
    assert_moments(z, 0.2, 1.6)
    share = draws.second_t / draws.start_t
    # that none of 20,000 lies nearer has odds of e⁻⁵⁰
    assert (share.min().item(), share.max().item()) == pytest.approx((0.3, 0.7), abs=1e-3)
    for scale in (4.0, 4.5, 5.0):
        assert (draws.guidance == scale).float().mean().item() == near(
            1 / 3, sampling(math.sqrt(2) / 3, 20_000), scale=1
        )
    assert draws.guidance.unique().numel() == 3
    noises = torch.stack([draws.noise, draws.start_noise, draws.renoise_noise[:, 0]]).flatten(1)
    assert torch.corrcoef(noises).sub(torch.eye(3)).abs().max() < sampling(1, 20_000)


def test_separate_renoising_draws_for_each_kind(stage):
    """What came before is drawn as with shared renoising."""
    recipe = make_recipe(batch_size=20_000)
    shared = draw(recipe, 0, (1, 1, 1))
    recipe.distill.adversarial.renoising = Renoising.separate
    draws = draw(recipe, 0, (1, 1, 1))
    assert all(torch.equal(a, b) for a, b in zip(draws[:5], shared[:5], strict=True))
    assert shared.renoise_t.shape == (20_000, 1) and draws.renoise_t.shape == (20_000, 3)
    z = torch.log(SIGMA_DATA * torch.tan(draws.renoise_t.double()))
    for kind in range(3):
        assert_moments(z[:, kind], -0.6, 1.0)
    both = torch.cat([z.T.float(), draws.renoise_noise.flatten(1).T])
    assert torch.corrcoef(both).sub(torch.eye(6)).abs().max() < sampling(1, 20_000)


@pytest.mark.parametrize("renoising", Renoising)
def test_each_kind_is_renoised_with_its_own_draw_or_with_the_only_one(renoising):
    recipe, batch = make_recipe(), tiny_batch()
    recipe.distill.adversarial.renoising = renoising
    draws = draw(recipe, 0, LATENT)
    for kind in (terms.REAL, terms.GENERATED, terms.MISALIGNED):
        own = kind if renoising is Renoising.separate else 0
        t = draws.renoise_t[:, own]
        c, s = (f(t)[:, None, None, None] for f in (torch.cos, torch.sin))
        x_hat, told, *_ = terms.renoised_features(lambda *given: given, batch.latent, draws, batch, kind)
        by_hand = (c * batch.latent + s * SIGMA_DATA * draws.renoise_noise[:, own]) / SIGMA_DATA
        assert torch.equal(told, t)
        assert_close(x_hat, by_hand, rounding(torch.float32, terms=4))


# ---- pieces -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_teachers_velocity_is_guided_with_the_drawn_scale(stage):
    batch, draws, (null_text, null_mask) = tiny_batch(), draw(stage.recipe, 0, LATENT), stage.null
    x_t = diffuse(SIGMA_DATA * batch.latent, draws.noise, draws.t)
    F_c = stage.teacher(x_t / SIGMA_DATA, draws.t, batch.text, batch.mask)
    F_u = stage.teacher(x_t / SIGMA_DATA, draws.t, null_text.expand(8, -1, -1), null_mask.expand(8, -1))
    w = draws.guidance[:, None, None, None]
    expected = SIGMA_DATA * (F_u + w * (F_c - F_u))
    guided = (2 * w.max().item() + 1) * of_network(stage.teacher)  # w F_c and (1 − w) F_u err apart
    assert_close(teacher_velocity(stage.teacher, x_t, draws, stage.with_null(batch)), expected, guided)


@torch.no_grad()
def test_the_null_prompt_may_show_as_many_tokens_as_its_prompt(stage):
    """Its mask is then the prompt's in the unconditional branch, and its text is the null prompt's still."""
    batch, (null_text, _) = tiny_batch(), stage.null
    stage.settings.null_mask = NullMask.prompts
    guided = stage.with_null(batch)
    assert torch.equal(guided.mask, torch.cat([batch.mask, batch.mask]))
    assert torch.equal(guided.text, torch.cat([batch.text, null_text.expand(8, -1, -1)]))
    stage.settings.null_mask = NullMask.own
    assert torch.equal(stage.with_null(batch).mask[8:], stage.null[1].expand(8, -1))


@torch.no_grad()
def test_one_step_from_max_time_begins_in_pure_noise(stage):
    """At t = π/2 the sample does not depend on the latent, and is −σ_d · F(noise)."""
    draws = draw(stage.recipe, 0, LATENT)
    draws = draws._replace(start_t=torch.full((8,), HALF_PI))
    batch = tiny_batch()
    x_0 = one_step_sample(stage.generator.trained, batch, draws).x_0
    other = one_step_sample(stage.generator.trained, batch._replace(latent=-batch.latent), draws).x_0
    assert_close(x_0, other, of_network(stage.student))
    F = stage.student(draws.start_noise, draws.start_t, batch.text, batch.mask, draws.guidance)
    assert_close(x_0, -SIGMA_DATA * F, of_network(stage.student))


def test_the_consistency_loss_is_the_written_algorithm(stage):
    """Against central differences of the student in place of its tangent; r = 0.5 after two of four updates."""
    stage.generator_updates = 2
    batch, draws = tiny_batch(), draw(stage.recipe, 0, LATENT)
    loss, seen = stage.consistency_term(batch, stage.with_null(batch), draws)
    t, x_t = draws.t, diffuse(SIGMA_DATA * batch.latent, draws.noise, draws.t)
    with torch.no_grad():
        v = teacher_velocity(stage.teacher, x_t, draws, stage.with_null(batch))
        student = copy.deepcopy(stage.student)

        def F_at(x_t, t):
            return student(x_t / SIGMA_DATA, t, batch.text, batch.mask, draws.guidance)

        s_c = (torch.sin(t) * torch.cos(t))[:, None, None, None]
        h = 1e-2
        F_prime = s_c * (F_at(x_t + h * v, t + h) - F_at(x_t - h * v, t - h)) / (2 * h)
        c2 = torch.cos(t)[:, None, None, None] ** 2
        g = -c2 * (SIGMA_DATA * F_at(x_t, t) - v) - 0.5 * (s_c * x_t + SIGMA_DATA * F_prime)
        g = g / (g.flatten(1).norm(dim=1)[:, None, None, None] + 0.1)
        logvar = student.log_variance(t, draws.guidance)
        weight = torch.exp(-logvar) / (SIGMA_DATA * torch.tan(t))
        by_hand = (weight * g.square().mean((1, 2, 3)) + logvar).mean()
    tolerance = central(h, of_network(stage.student))
    assert loss.item() == near(by_hand.item(), tolerance)
    assert seen["tangent_norm"].item() == near(F_prime.flatten(1).norm(dim=1).mean().item(), tolerance)


def test_log_variance_starts_where_it_settles(stage):
    t = draw(stage.recipe, 0, LATENT).t
    logvar = stage.student.log_variance(t, torch.full_like(t, 4.5))
    assert logvar.mean().item() == pytest.approx(
        losses.settled_logvar(t, math.prod(LATENT)).mean().item(), abs=1.5
    )


def test_the_hinge_sees_each_kind_once(stage, monkeypatch):
    """Real pictures under their prompts are not doubled by the misaligned ones."""
    seen = []

    def features(tapped, x_0, draws, batch, kind):
        seen.append((x_0, batch.text))
        assert kind == len(seen) - 1
        return original(tapped, x_0, draws, batch, kind)

    original = terms.renoised_features
    monkeypatch.setattr(terms, "renoised_features", features)
    logits = []
    monkeypatch.setitem(
        terms.DISCRIMINATOR_LOSSES,
        AdversarialLoss.hinge,
        lambda real, fake: logits.append((real, fake)) or real.mean(),
    )
    batch, draws = tiny_batch(), draw(stage.recipe, D, LATENT)
    stage.heads_term(batch, draws)
    real = SIGMA_DATA * batch.latent
    assert len(seen) == 3
    assert torch.equal(seen[0][0], real)
    with torch.no_grad():
        assert torch.equal(seen[1][0], one_step_sample(stage.generator.trained, batch, draws).x_0)
    assert torch.equal(seen[2][0], real[[3, 0, 1, 2, 7, 4, 5, 6]])  # a prompt of one of four neighbours
    assert all(torch.equal(text, batch.text) for _, text in seen)
    (real_logits, fake_logits), per_sample = logits[0], 2 * 16  # two taps, 16 tokens
    assert real_logits.shape == (8, per_sample) and fake_logits.shape == (16, per_sample)


def test_without_misaligned_pairs_fakes_are_the_generated_ones(engine, monkeypatch):
    stage = make_stage(engine)
    stage.settings.adversarial.misaligned_pairs = False
    shapes = []
    monkeypatch.setitem(
        terms.DISCRIMINATOR_LOSSES,
        AdversarialLoss.hinge,
        lambda real, fake: shapes.append((len(real), len(fake))) or real.mean(),
    )
    stage.heads_term(tiny_batch(), draw(stage.recipe, D, LATENT))
    assert shapes == [(8, 8)]


def heads_that_tell(calls):
    """Logits that are what a group's mean is: [B, 1]."""

    def heads(features, group):
        calls.append((len(features[0]), group))
        (x,) = features
        return torch.cat([part - part.mean(0) for part in x.split(group)])

    return heads


def tapped_as_it_is(x_hat, t, text, mask):
    return [x_hat.flatten(1).mean(1, keepdim=True)]


@torch.no_grad()
@pytest.mark.parametrize("groups", NormGroups)
def test_who_shares_a_group_of_the_heads(stage, groups, monkeypatch):
    """Heads that take a group's mean away: of mixed kinds it tells them apart, of each kind alone it cannot."""
    settings, batch, calls = stage.settings, tiny_batch(), []
    settings.adversarial.norm_groups = groups
    clean = draw(stage.recipe, D, LATENT)
    clean = clean._replace(renoise_t=torch.zeros_like(clean.renoise_t))  # no noise: features tell x_0
    monkeypatch.setattr(terms, "swapped", lambda x, neighbours: torch.full_like(x, -2 * SIGMA_DATA))
    monkeypatch.setattr(
        terms, "one_step_sample", lambda *_: Sample(-torch.ones(8, *LATENT), *[torch.zeros(8)] * 3)
    )
    batch = batch._replace(
        latent=torch.ones_like(batch.latent)
    )  # features: real 1, generated and misaligned −2
    _, seen = terms.discriminator_term(
        None, tapped_as_it_is, heads_that_tell(calls), batch, clean, settings.adversarial, stage.clock
    )
    _, generator = terms.sample_term(
        None, tapped_as_it_is, heads_that_tell(calls), batch, clean, settings, stage.clock
    )
    if groups is NormGroups.mixed:  # means −1 of three kinds, −1/2 of two
        assert calls == [(24, 12), (16, 8)]
        assert (seen["logit_real"].item(), seen["logit_fake"].item()) == pytest.approx((2, -1), rel=1e-6)
        assert generator["loss_adv"].item() == pytest.approx(1.5, rel=1e-6)
    else:
        assert calls == [(24, 4), (8, 4)]
        assert (seen["logit_real"].item(), seen["logit_fake"].item()) == (0, 0)
        assert generator["loss_adv"].item() == 0


@pytest.mark.parametrize("step", [G, D])
@pytest.mark.parametrize(
    "setting", [{"norm_groups": NormGroups.separate}, {"renoising": Renoising.separate}], ids=str
)
def test_a_stage_trains_with_each_choice_and_differs(engine, step, setting):
    plain, other = make_stage(engine), make_stage(engine)
    for name, value in setting.items():
        setattr(other.settings.adversarial, name, value)
    losses_of = [stage.update(step, tiny_batch()).read(engine)["loss"] for stage in (plain, other)]
    assert all(map(math.isfinite, losses_of)) and losses_of[0] != losses_of[1]


# ---- phases -------------------------------------------------------------------------------------------


def test_phases_take_turns(engine, stage):
    assert [stage.phase(step) for step in range(4)] == [GENERATOR, DISCRIMINATOR, GENERATOR, DISCRIMINATOR]
    alone = make_stage(engine, adversarial=0.0)
    assert [alone.phase(step) for step in range(3)] == [GENERATOR] * 3


def test_the_generator_phase_moves_the_student_only(stage):
    stage.update(D, tiny_batch())  # so that the heads have gradients to leave behind
    stage.discriminator.trained.zero_grad()
    student, heads, teacher = snapshot(stage.student), snapshot(stage.heads), snapshot(stage.teacher)
    assert any(key.endswith("._u") for key in heads)
    stage.update(G, tiny_batch())
    assert same(heads, snapshot(stage.heads)) and same(teacher, snapshot(stage.teacher))
    assert all(p.grad is None for p in stage.heads.parameters())
    assert all(p.grad is None for p in stage.teacher.parameters())
    moved = [key for key, value in snapshot(stage.student).items() if not torch.equal(value, student[key])]
    still = student.keys() - moved
    assert all("guidance_embedder.linear_1" in key for key in still)  # behind a zero layer until it moves


def test_the_discriminator_phase_moves_the_heads_only(stage):
    student, heads, teacher = snapshot(stage.student), snapshot(stage.heads), snapshot(stage.teacher)
    stage.update(D, tiny_batch())
    assert same(student, snapshot(stage.student)) and same(teacher, snapshot(stage.teacher))
    assert all(p.grad is None for p in stage.student.parameters())
    assert all(p.grad is None for p in stage.teacher.parameters())
    after = snapshot(stage.heads)
    assert all(
        not torch.equal(after[key], heads[key]) for key in heads if "_u" not in key and "_v" not in key
    )
    assert all(p.requires_grad for p in stage.heads.parameters()) and stage.heads.training


def test_metrics_of_each_phase(engine, stage):
    common = {"loss", "grad_norm", "skipped"}
    read = stage.update(G, tiny_batch()).read(engine)
    assert read.keys() == common | {"loss_scm", "loss_adv", "tangent_norm", "logvar"}
    assert read["loss"] == near(
        read["loss_scm"] + 0.5 * read["loss_adv"],
        rounding(torch.float32, terms=2),
        scale=abs(read["loss_scm"]) + abs(read["loss_adv"]),
    )
    assert stage.update(D, tiny_batch()).read(engine).keys() == common | {"logit_real", "logit_fake"}


def test_a_term_of_weight_zero_is_not_computed(engine, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("computed")

    scm_only, ladd_only = make_stage(engine, adversarial=0.0), make_stage(engine, consistency=0.0)
    with monkeypatch.context() as patched:
        patched.setattr(terms, "renoised_features", never)
        assert "loss_adv" not in scm_only.update(G, tiny_batch()).read(engine)
        scm_only.update(D, tiny_batch())
        assert scm_only.generator_updates == 2
    monkeypatch.setattr(consistency, "value_and_tangent", never)
    monkeypatch.setattr(consistency, "teacher_velocity", never)
    assert "loss_scm" not in ladd_only.update(G, tiny_batch()).read(engine)


def test_optimizers_have_their_own_settings(engine):
    recipe = make_recipe()
    recipe.distill.adversarial.optimizer.lr = 7e-5
    stage = DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)
    for updater, module, lr in (
        (stage.generator, stage.student, 1e-3),
        (stage.discriminator, stage.heads, 7e-5),
    ):
        (group,) = updater.trained.optimizer.param_groups
        assert group["lr"] == lr
        assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}


def test_the_average_follows_the_student_in_generator_updates(stage):
    before = {name: value.clone() for name, value in stage.ema.shadow.items()}
    stage.update(D, tiny_batch())
    assert same(before, stage.ema.shadow)
    stage.update(G, tiny_batch())
    assert before.keys() == {f"student.{name}" for name, _ in stage.student.named_parameters()}
    for name, p in stage.student.named_parameters():
        key = f"student.{name}"
        torch.testing.assert_close(stage.ema.shadow[key], torch.lerp(before[key], p.detach(), 0.1))
    assert not same(before, stage.ema.shadow)


def test_tangent_warmup_counts_generator_updates_only(stage, monkeypatch):
    seen = []
    monkeypatch.setattr(
        losses, "tangent_warmup", lambda done, total: seen.append((done, total)) or min(1.0, done / total)
    )
    for step in range(6):
        stage.update(step, tiny_batch())
    assert seen == [(0, 4), (1, 4), (2, 4)]
    assert stage.generator_updates == 3


# ---- when gradients are not finite ----------------------------------------------------------------------


def test_a_bad_batch_skips_its_own_phase_and_the_turns_go_on(engine, stage):
    student, average = snapshot(stage.student), {k: v.clone() for k, v in stage.ema.shadow.items()}
    assert stage.update(G, bad_batch()).read(engine)["skipped"] == 1
    assert same(student, snapshot(stage.student)) and same(average, stage.ema.shadow)
    assert stage.generator_updates == 1  # the tangent's warm-up counts skipped updates too

    heads = {name: p.detach().clone() for name, p in stage.heads.named_parameters()}
    assert stage.update(D, bad_batch()).read(engine)["skipped"] == 1
    assert all(torch.equal(heads[name], p) for name, p in stage.heads.named_parameters())

    assert stage.phase(2) == GENERATOR
    assert stage.update(2, tiny_batch()).read(engine)["skipped"] == 1
    assert stage.generator_updates == 2 and not same(student, snapshot(stage.student))
    assert all(torch.isfinite(value).all() for value in snapshot(stage.heads).values())


def test_twenty_bad_updates_of_one_phase_stop_the_run(engine, stage):
    stage.generator.skipped_in_a_row.fill_(PATIENCE - 2)
    stage.update(G, bad_batch()).read(engine)
    stage.update(D, bad_batch()).read(engine)
    with pytest.raises(SprintError, match="20 updates in a row"):
        stage.update(G, bad_batch()).read(engine)
