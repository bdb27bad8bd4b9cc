"""Stage 2 in micro-batches, stopped and gone on with, in other precisions, and what it refuses."""

import pytest
import torch

from sprint.base.errors import SprintError
from sprint.engine.optim import start_state
from sprint.maths.schedule import lognormal_trig_times
from sprint.maths.trigflow import SIGMA_DATA, data_estimate, diffuse
from sprint.recipe.schema import Optimizer
from sprint.recipe.shares import check_shares
from sprint.train import distill
from sprint.train.distill import DistillStage
from sprint.train.draws import Draws, draw
from sprint.train.terms.sample import one_step_sample
from tests.tiny import LATENT, same, snapshot, tiny_batch, tiny_network, tiny_null
from tests.tolerance import assert_all_close, assert_close, near, of_network, readings
from tests.train.test_adapt import kept, load
from tests.train.test_distill import (
    D,
    G,
    gradients,
    make_recipe,
    make_stage,
)


@pytest.fixture
def stage(engine):
    return make_stage(engine)


@pytest.fixture
def draws_in_float64(true_float64, monkeypatch):
    def double(*arguments):
        return Draws(*(tensor.double() for tensor in draw(*arguments)))

    monkeypatch.setattr(distill, "draw", double)


def exact_stage(engine, **changes) -> DistillStage:
    """In float64, where no activation is so near the corner of a ReLU that another order of sums turns it over:
    in float32 one of the heads' sixty thousand may be, and then moves a gradient by a thousandth."""
    recipe, null = make_recipe(**changes), tiny_null(torch.float64)
    # CAME, for torch's fused AdamW takes no double for what `true_float64` makes of its flag
    recipe.distill.optimizer = recipe.distill.adversarial.optimizer = Optimizer(clip_norm=1e9)
    stage = DistillStage(recipe, engine, tiny_network().double(), null, LATENT)
    stage.student.double()
    updaters = [stage.generator]
    if stage.settings.adversarial.weight:
        stage.heads.double()
        updaters.append(stage.discriminator)
    for updater in updaters:
        updater.trained.optimizer.state.clear()
        start_state(updater.trained.optimizer)
    return stage


def update_of(stage: DistillStage) -> float:
    """Rounding of one update: student or heads behind the teacher, forward, tangent, and backward twice."""
    return of_network(stage.student, stage.teacher, passes=4)


@pytest.mark.parametrize("largest", [1, 3, 4])
def test_micro_batches_give_the_consistency_gradient_of_the_whole(engine, draws_in_float64, largest):
    stages = [exact_stage(engine, adversarial=0.0, micro_batch_size=size) for size in (0, largest)]
    reads = [stage.update(0, tiny_batch(dtype=torch.float64)).read(engine) for stage in stages]
    tolerance = update_of(stages[0])
    assert reads[0] == readings(reads[1], tolerance)
    assert_all_close(*(gradients(stage.student) for stage in stages), tolerance)


@pytest.mark.parametrize("batch_size", [16, 10])
@pytest.mark.parametrize("step", [G, D])
def test_a_step_in_parts_of_whole_groups_is_the_step_of_the_whole(engine, draws_in_float64, step, batch_size):
    """Misaligned pairs included; of 10 samples the last two are a group of their own."""
    stages = [exact_stage(engine, micro_batch_size=size, batch_size=batch_size) for size in (0, 4, 8)]
    for stage in stages:
        assert stage.settings.adversarial.misaligned_pairs
    batch = tiny_batch(batch_size, dtype=torch.float64)
    reads = [stage.update(step, batch).read(engine) for stage in stages]
    kind = "student" if step == G else "heads"
    whole, *cut = (gradients(getattr(stage, kind)) for stage in stages)
    tolerance = update_of(stages[0])
    for read, found in zip(reads[1:], cut, strict=True):
        assert read == readings(reads[0], tolerance)
        assert_all_close(found, whole, tolerance)


def test_the_spectral_norms_move_once_an_update_however_many_parts_it_has(engine):
    stages = [make_stage(engine, micro_batch_size=size, batch_size=16) for size in (0, 4, 8)]
    before = {name: buffer.clone() for name, buffer in stages[0].heads.named_buffers()}
    for stage in stages:
        stage.update(D, tiny_batch(16))
    whole, *cut = (dict(stage.heads.named_buffers()) for stage in stages)
    assert not same(before, whole)
    for found in cut:
        assert same(found, whole)


@pytest.mark.parametrize("step", [G, D])
def test_other_neighbours_are_another_step(engine, step):
    """That the test above can fail."""
    four, two = make_stage(engine), make_stage(engine)
    two.settings.adversarial.neighbours = 2
    losses = [stage.update(step, tiny_batch()).read(engine)["loss"] for stage in (four, two)]
    assert losses[0] != near(losses[1], update_of(four), scale=1)


def test_every_weight_has_a_gradient_in_the_adversarial_term(engine):
    """DDP averages when the last one is there: the log-variance's is zero where the loss does not need it."""
    stage = make_stage(engine, consistency=0.0)
    batch, draws = tiny_batch(), draw(stage.recipe, G, LATENT)
    (of_samples,) = stage.student_terms()
    loss, _ = of_samples(batch, None, draws)
    stage.generator.trained.backward(loss)
    grads = gradients(stage.student)
    assert all(gradient is not None for gradient in grads.values())
    own = {name for name in grads if name.startswith("logvar.")}
    assert len(own) == 2 and all((grads[name] == 0).all() for name in own)
    assert grads["view.network.proj_out.weight"].norm() > 0


def test_state_goes_round_and_training_goes_on_bit_for_bit(engine):
    one = make_stage(engine)
    for step in range(3):
        one.update(step, tiny_batch(seed=step))
    other = make_stage(engine, seed=0)
    other.update(G, tiny_batch(seed=77))
    assert not same(one.tensors(), other.tensors())
    load(other, one)
    assert same(one.tensors(), other.tensors()) and other.generator_updates == 2
    for stage in (one, other):
        for step in range(3, 6):
            stage.update(step, tiny_batch(seed=step))
    assert same(one.tensors(), other.tensors())
    assert same(snapshot(one.student), snapshot(other.student))
    assert same(snapshot(one.heads), snapshot(other.heads))
    assert same(one.ema.shadow, other.ema.shadow)
    assert one.generator_updates == other.generator_updates == 3 and one.facts() == other.facts()


def test_a_checkpoint_has_the_student_the_heads_and_the_average(stage):
    """By kind and weight; of the heads the vectors of the spectral norms too."""
    names = stage.tensors().keys()
    weights = {name for name, _ in stage.student.named_parameters()}
    for prefix in ("student.weights", "student.exp_avg", "student.exp_avg_sq", "student.step", "ema"):
        assert {f"{prefix}.student.{name}" for name in weights} <= names
    for name in stage.heads.state_dict():
        kind = "buffers" if name.endswith(("._u", "._v")) else "weights"
        assert f"heads.{kind}.{name}" in names
    assert {"student.skipped", "heads.skipped_in_a_row"} <= names
    lost = stage.tensors()
    del lost["ema.student.logvar.bias"]
    with pytest.raises(KeyError, match=r"ema\.student\.logvar\.bias"):
        stage.load(kept(lost), stage.facts())


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_the_result_is_the_student_with_averaged_weights_if_there_are_any(engine, decay):
    stage = make_stage(engine, ema_decay=decay)
    for step in (0, 2):
        stage.update(step, tiny_batch(seed=step))
    own = {f"student.{name}": p.detach() for name, p in stage.student.named_parameters()}
    result = stage.result()
    given = {f"student.{name}": p.detach() for name, p in result.named_parameters()}
    assert same(given, stage.ema.shadow if decay else own)
    assert same(given, own) == (decay == 0) and not result.training
    x_hat, text, mask = tiny_batch()
    draws = draw(stage.recipe, 0, LATENT)
    with torch.no_grad():
        F = result(x_hat, draws.t, text, mask, draws.guidance)
        stage.student.load_state_dict(result.state_dict())
        expected = stage.student.eval()(x_hat, draws.t, text, mask, draws.guidance)
    assert_close(F, expected, of_network(result))


def test_the_student_begins_as_its_seed_says(engine):
    first, again, other = make_stage(engine), make_stage(engine), make_stage(engine, seed=1)
    assert same(snapshot(first.student), snapshot(again.student))
    assert same(snapshot(first.heads), snapshot(again.heads))
    assert not same(snapshot(first.heads), snapshot(other.heads))


def test_bf16_losses_are_close_to_float32(bf16_engine):
    stage = make_stage(bf16_engine, self_consistency=1.0)
    batch, draws = tiny_batch(), draw(stage.recipe, 0, LATENT)
    draws = draws._replace(t=lognormal_trig_times(8, 0.0, 0.5, torch.Generator().manual_seed(0)))
    with bf16_engine.autocast():
        scm, _ = stage.consistency_term(batch, stage.with_null(batch), draws)
        with stage._for_heads(batch, first=True) as (given,):
            hinge, _ = stage.heads_term(given, draws)
    with torch.autocast("cpu", enabled=False):
        x_0 = one_step_sample(stage.generator.trained, batch, draws).x_0
    assert scm.dtype == hinge.dtype == x_0.dtype == torch.float32
    assert torch.isfinite(scm) and 0 < hinge.item() < 3
    read = stage.update(G, batch).read(bf16_engine)
    assert read["grad_norm"] > 0 and read["skipped"] == 0 and 0 < read["loss_self"] < 10
    assert stage.update(D, batch).read(bf16_engine)["skipped"] == 0


def test_a_sample_without_neighbour_is_refused_where_pairs_are_misaligned(engine):
    """It would count as real and as fake."""
    with pytest.raises(
        SprintError, match="at least 2 neighbours, and a share of 9 in groups of 4 leaves 1 alone"
    ):
        make_stage(engine, batch_size=9)
    make_stage(engine, batch_size=10)
    make_stage(engine, batch_size=9, adversarial=0.0)
    recipe = make_recipe()
    recipe.distill.adversarial.neighbours = 1
    with pytest.raises(SprintError, match="a share of 8 in groups of 1 leaves 1 alone"):
        DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)
    recipe.distill.adversarial.misaligned_pairs = False
    DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)


def test_a_group_over_two_processes_is_refused(stage):
    stage.settings.batch_size = 12
    refused = (
        "leaves each of 2 processes a share of 6, which distill.adversarial.neighbours = 4 does not divide"
    )
    with pytest.raises(SprintError, match=refused):
        check_shares(stage.recipe, 2)
    stage.settings.batch_size = 16
    check_shares(stage.recipe, 2)
    stage.settings.batch_size, stage.settings.adversarial.weight = 12, 0.0
    check_shares(stage.recipe, 2)


def test_a_tap_outside_the_teacher_is_named(engine):
    recipe = make_recipe()
    recipe.distill.adversarial.taps = (0, 2)
    with pytest.raises(SprintError, match=r"taps = \[0, 2\], but the teacher's blocks are 0 to 1"):
        DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)


def test_the_estimate_of_the_data_is_exact_for_an_exact_student(stage):
    """one_step_sample is data_estimate at the student's own velocity, in TrigFlow's units."""
    batch, draws = tiny_batch(), draw(stage.recipe, 0, LATENT)
    x_t = diffuse(SIGMA_DATA * batch.latent, draws.start_noise, draws.start_t)
    with torch.no_grad():
        F = stage.student(x_t / SIGMA_DATA, draws.start_t, batch.text, batch.mask, draws.guidance)
        expected = data_estimate(x_t, F, draws.start_t)
        assert torch.equal(one_step_sample(stage.generator.trained, batch, draws).x_0, expected)
