import json
import math

import pytest
import torch
from torch import nn

from sprint.base.errors import Diverged, SprintError
from sprint.engine.held import Held, Read, Tensors
from sprint.models.view import FlowVelocity
from sprint.recipe.schema import Optimizer, OptimizerKind
from sprint.train.adapt import AdaptStage, FlowDraws, draw_flow, flow_loss, noised
from sprint.train.update import PATIENCE
from tests.tiny import LATENT, same, snapshot, tiny_batch, tiny_network, tiny_null, tiny_recipe
from tests.tolerance import assert_all_close, near, of_autocast, of_network, readings, rounding, sampling


def make_stage(engine, **changes) -> AdaptStage:
    recipe = tiny_recipe()
    for key, value in changes.items():
        setattr(recipe if hasattr(recipe, key) else recipe.adapt, key, value)
    return AdaptStage(recipe, engine, tiny_network(), tiny_null())


def gradients(module) -> dict:
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def bad_batch(value: float = math.nan):
    return tiny_batch()._replace(latent=torch.full((8, *LATENT), value))


def copied(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def kept(tensors: Tensors) -> Read:
    """A checkpoint in memory: fills tensors in place, by name. KeyError for a name that it does not have."""
    stored = copied(tensors)

    def read(wanted: Tensors) -> None:
        for name, tensor in wanted.items():
            assert (tensor.shape, tensor.dtype) == (stored[name].shape, stored[name].dtype), name
            tensor.copy_(stored[name])

    return read


def load(stage, saved) -> None:
    """What another stage would save, into `stage`; the facts as JSON holds them."""
    stage.load(kept(saved.tensors()), json.loads(json.dumps(saved.facts())))


def test_draws_depend_on_seed_and_step_alone():
    first = draw_flow(1, 5, 8, LATENT, 3.0, 0.5)
    torch.manual_seed(123)
    again = draw_flow(1, 5, 8, LATENT, 3.0, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (draw_flow(2, 5, 8, LATENT, 3.0, 0.5), draw_flow(1, 6, 8, LATENT, 3.0, 0.5)):
        assert not torch.equal(first.noise, other.noise) and not torch.equal(first.t_fm, other.t_fm)


def test_the_share_of_dropped_captions():
    dropped = draw_flow(0, 0, 20_000, (1, 1, 1), 3.0, 0.1).dropped
    assert dropped.float().mean().item() == near(0.1, sampling(0.3, 20_000), scale=1)  # √(0.1 · 0.9)
    assert not draw_flow(0, 0, 100, (1, 1, 1), 3.0, 0.0).dropped.any()


def test_the_noised_latent_by_hand():
    draws = FlowDraws(torch.tensor([0.0, 0.25, 1.0]), torch.full((3, 1, 1, 1), 8.0), torch.zeros(3).bool())
    assert noised(torch.full((3, 1, 1, 1), 4.0), draws).flatten().tolist() == [4, 5, 8]


@torch.no_grad()
def test_flow_loss_is_the_error_of_the_flow_velocity():
    velocity = FlowVelocity(tiny_network())
    batch, null = tiny_batch(4), tiny_null()
    draws = draw_flow(0, 0, 4, LATENT, 3.0, 0.0)
    v = velocity.view.flow_velocity(noised(batch.latent, draws), draws.t_fm, batch.text, batch.mask)
    by_hand = ((v - (draws.noise - batch.latent)) ** 2).mean()
    mean = rounding(torch.float32, terms=v.numel())
    assert flow_loss(velocity, batch, draws, null).item() == near(by_hand.item(), mean)


@torch.no_grad()
def test_a_dropped_caption_is_the_null_prompt_with_its_own_mask():
    velocity = FlowVelocity(tiny_network())
    batch, null = tiny_batch(4), tiny_null()
    draws = draw_flow(0, 0, 4, LATENT, 3.0, 0.0)
    all_dropped = flow_loss(velocity, batch, draws._replace(dropped=torch.ones(4).bool()), null)
    expanded = batch._replace(text=null[0].expand(4, -1, -1), mask=null[1].expand(4, -1))
    assert all_dropped.item() == near(flow_loss(velocity, expanded, draws, null).item(), of_network(velocity))
    conditional_mask = batch._replace(text=expanded.text)
    assert abs(all_dropped - flow_loss(velocity, conditional_mask, draws, null)) > 1e-4


def test_every_weight_moves(engine):
    stage = make_stage(engine)
    before = snapshot(stage.network)
    stage.update(0, tiny_batch())
    after = snapshot(stage.network)
    assert all(not torch.equal(before[key], after[key]) for key in before)


def test_the_loss_falls(engine):
    stage = make_stage(engine)
    stage.settings.caption_dropout = 0.0
    batch, losses = tiny_batch(), []
    for step in range(60):
        losses.append(stage.update(step, batch).read(engine)["loss"])
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("largest", [1, 3, 4])
def test_micro_batches_give_the_gradient_of_the_whole(engine, largest):
    whole, cut = make_stage(engine), make_stage(engine, micro_batch_size=largest)
    losses = [stage.update(2, tiny_batch()).read(engine)["loss"] for stage in (whole, cut)]
    assert losses[0] == near(losses[1], of_network(whole.network))
    ours, theirs = gradients(whole.network), gradients(cut.network)
    assert_all_close(ours, theirs, of_network(whole.network, passes=3, terms=8 * 16))  # samples, tokens


def test_metrics_are_those_of_the_update(engine):
    stage = make_stage(engine)
    read = stage.update(0, tiny_batch()).read(engine)
    assert read.keys() == {"loss", "grad_norm", "skipped"}
    assert read["loss"] > 0 and read["grad_norm"] > 0 and read["skipped"] == 0


def test_an_update_without_finite_gradient_is_skipped_and_counted(engine):
    stage = make_stage(engine)
    before = snapshot(stage.network)
    bad = bad_batch()
    assert stage.update(0, bad).read(engine)["skipped"] == 1
    assert same(before, snapshot(stage.network))
    assert stage.update(1, tiny_batch()).read(engine)["skipped"] == 1
    assert not same(before, snapshot(stage.network))
    assert all(torch.isfinite(value).all() for value in snapshot(stage.network).values())


def test_twenty_skipped_in_a_row_stop_the_run(engine):
    stage = make_stage(engine)
    bad = bad_batch()
    for step in range(PATIENCE - 1):
        assert stage.update(step, bad).read(engine)["skipped"] == step + 1
    stage.update(PATIENCE, tiny_batch())  # one good update starts the count again
    for step in range(PATIENCE - 1):
        stage.update(step, bad).read(engine)
    means = stage.update(99, bad)  # reads nothing, so says nothing
    for _ in range(2):
        with pytest.raises(Diverged, match="20 updates in a row without a finite gradient"):
            means.read(engine)


def test_the_count_of_skipped_updates_survives_a_resume(engine):
    first, second = make_stage(engine), make_stage(engine)
    for step in range(PATIENCE - 1):
        first.update(step, bad_batch())
    load(second, first)
    assert (second.updater.skipped, second.updater.skipped_in_a_row) == (PATIENCE - 1, PATIENCE - 1)
    with pytest.raises(SprintError, match="20 updates in a row"):
        second.update(PATIENCE, bad_batch()).read(engine)


def test_a_skipped_update_has_its_place_in_the_schedule_and_leaves_the_rest(engine):
    stage = make_stage(engine)
    stage.update(0, tiny_batch())
    before, place = copied(stage.tensors()), stage.facts()["schedule"]["last_epoch"]
    stage.update(1, bad_batch(math.inf))
    after = copied(stage.tensors())
    assert (place, stage.facts()["schedule"]["last_epoch"]) == (1, 2)
    for count in ("skipped", "skipped_in_a_row"):
        assert (before.pop(count), after.pop(count)) == (0, 1)
    assert same(before, after)


def made(kind: OptimizerKind, steps: int, engine, seed: int = 0) -> AdaptStage:
    """A stage in the middle of its warm-up."""
    betas = (0.9, 0.999, 0.9999) if kind is OptimizerKind.came else (0.9, 0.99)
    stage = make_stage(engine, optimizer=Optimizer(kind, 1e-3, betas, warmup_steps=5), seed=seed)
    for step in range(steps):
        stage.update(step, tiny_batch(seed=step))
    return stage


@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_state_goes_round_and_training_goes_on_bit_for_bit(engine, kind):
    one, other = made(kind, 3, engine), made(kind, 1, engine)
    assert not same(one.tensors(), other.tensors())
    load(other, one)
    assert same(one.tensors(), other.tensors())
    for stage in (one, other):
        for step in range(3, 6):
            stage.update(step, tiny_batch(seed=step))
    assert same(one.tensors(), other.tensors())
    assert same(snapshot(one.network), snapshot(other.network))
    assert one.facts() == other.facts()


def test_names_in_a_checkpoint_are_kind_and_weight(engine):
    stage = make_stage(engine)
    names = [f"view.network.{name}" for name, _ in stage.network.named_parameters()]
    kinds = ("weights", "exp_avg", "exp_avg_sq", "step")
    expected = {f"{kind}.{name}" for kind in kinds for name in names} | {"skipped", "skipped_in_a_row"}
    assert stage.tensors().keys() == expected
    lost = stage.tensors()
    del lost[f"exp_avg.{names[-1]}"]
    with pytest.raises(KeyError, match=names[-1]):
        stage.load(kept(lost), stage.facts())


def test_the_result_is_the_trained_network(engine):
    stage = make_stage(engine)
    stage.update(0, tiny_batch())
    result, draws = stage.result(), draw_flow(0, 0, 8, LATENT, 3.0, 0.0)
    assert same(snapshot(result), snapshot(stage.network)) and not result.training
    assert not same(snapshot(result), snapshot(tiny_network()))
    with torch.no_grad():
        ours, theirs = (
            flow_loss(FlowVelocity(network.eval()), tiny_batch(), draws, tiny_null())
            for network in (result, stage.network)
        )
    assert ours.item() == near(theirs.item(), of_network(result))


def test_the_clock_has_every_part_of_the_update(engine):
    stage = make_stage(engine, micro_batch_size=4)
    stage.clock.restart()
    stage.update(0, tiny_batch())
    times = stage.clock.read()
    assert list(times) == ["forward", "backward", "optimizer", "other"]
    assert all(value > 0 for value in times.values())


def test_activation_checkpointing_changes_no_number(engine):
    plain, checkpointed = make_stage(engine), make_stage(engine, activation_checkpointing=True)
    assert checkpointed.network.gradient_checkpointing
    reads = [stage.update(0, tiny_batch()).read(engine) for stage in (plain, checkpointed)]
    assert reads[0] == readings(reads[1], of_network(plain.network, passes=3))


def test_bf16_loss_is_close_to_float32(bf16_engine):
    half = make_stage(bf16_engine).update(0, tiny_batch()).read(bf16_engine)["loss"]
    batch, null = tiny_batch(), tiny_null()
    draws = draw_flow(0, 0, 8, LATENT, 3.0, 0.1)
    full = flow_loss(FlowVelocity(tiny_network()), batch, draws, null).item()
    assert half == near(full, of_autocast(tiny_network())) and half != full


# ---- one update of a module with its optimizer ----------------------------------------------------------


def make_whole(kind: OptimizerKind = OptimizerKind.adamw) -> Held:
    """weight [[1, 1]], lr 0.1, gradients clipped to a norm of 1."""
    module = nn.Linear(2, 1, bias=False)
    nn.init.ones_(module.weight)
    betas = (0.9, 0.99, 0.999) if kind is OptimizerKind.came else (0.9, 0.99)
    return Held(module, Optimizer(kind, lr=0.1, betas=betas, clip_norm=1.0))


def backward(trained: Held, *gradient: float, more: bool = False) -> None:
    with trained.accumulating(more):
        trained.backward(trained(torch.tensor([gradient])).sum())


def test_backwards_add_up_until_the_gradients_are_dropped():
    trained = make_whole()
    backward(trained, 1.0, 1.0, more=True)
    backward(trained, 2.0, 3.0)
    assert trained.module.weight.grad.tolist() == [[3, 4]]
    trained.zero_grad()
    assert trained.module.weight.grad is None
    backward(trained, 5.0, 6.0)
    assert trained.module.weight.grad.tolist() == [[5, 6]]


def test_an_update_clips_moves_and_tells_the_norm_before():
    trained = make_whole()
    backward(trained, 3.0, 4.0)
    norm, moved = trained.update()
    assert (norm.item(), moved.item()) == (5.0, True)
    momentum = trained.tensors()["exp_avg.weight"]
    torch.testing.assert_close(momentum, torch.tensor([[0.06, 0.08]]))  # (1 − β₁) · clipped gradient
    torch.testing.assert_close(trained.local()["weight"], torch.tensor([[0.9, 0.9]]))  # AdamW's first: ±lr


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_a_norm_that_is_not_finite_moves_nothing_and_the_next_update_does(kind, value):
    trained = make_whole(kind)
    backward(trained, 1.0, 2.0)
    trained.update()
    before = copied(trained.tensors())
    trained.zero_grad()
    backward(trained, value, 2.0)
    norm, moved = trained.update()
    assert not math.isfinite(norm) and not moved
    assert same(before, trained.tensors())
    trained.zero_grad()
    backward(trained, 1.0, 2.0)
    assert trained.update()[1]
    after = trained.tensors()
    assert all(not torch.equal(before[name], tensor) for name, tensor in after.items())
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
