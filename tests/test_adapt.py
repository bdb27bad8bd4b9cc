import copy
import math

import pytest
import torch

from sprint.errors import SprintError
from sprint.models.view import DENSE_TIME, TrigFlowView
from sprint.train.adapt import AdaptStage, FlowDraws, draw, flow_loss, noised
from sprint.train.update import PATIENCE
from tests.tiny import LATENT, same, snapshot, tiny_batch, tiny_network, tiny_null, tiny_recipe


def make_stage(engine, **changes) -> AdaptStage:
    recipe = tiny_recipe()
    for key, value in changes.items():
        setattr(recipe if hasattr(recipe, key) else recipe.adapt, key, value)
    return AdaptStage(recipe, engine, tiny_network(), tiny_null())


def gradients(module) -> dict:
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def test_draws_depend_on_seed_and_step_alone():
    first = draw(1, 5, 8, LATENT, 3.0, 0.5)
    torch.manual_seed(123)
    again = draw(1, 5, 8, LATENT, 3.0, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (draw(2, 5, 8, LATENT, 3.0, 0.5), draw(1, 6, 8, LATENT, 3.0, 0.5)):
        assert not torch.equal(first.noise, other.noise) and not torch.equal(first.t_fm, other.t_fm)


def test_the_share_of_dropped_captions():
    dropped = draw(0, 0, 20_000, (1, 1, 1), 3.0, 0.1).dropped
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert not draw(0, 0, 100, (1, 1, 1), 3.0, 0.0).dropped.any()


def test_the_noised_latent_by_hand():
    draws = FlowDraws(torch.tensor([0.0, 0.25, 1.0]), torch.full((3, 1, 1, 1), 8.0), torch.zeros(3).bool())
    assert noised(torch.full((3, 1, 1, 1), 4.0), draws).flatten().tolist() == [4, 5, 8]


@torch.no_grad()
def test_flow_loss_is_the_error_of_the_flow_velocity():
    view = TrigFlowView(tiny_network(), DENSE_TIME)
    batch, null = tiny_batch(4), tiny_null()
    draws = draw(0, 0, 4, LATENT, 3.0, 0.0)
    v = view.flow_velocity(noised(batch.latent, draws), draws.t_fm, batch.text, batch.mask)
    by_hand = ((v - (draws.noise - batch.latent)) ** 2).mean()
    assert flow_loss(view, batch, draws, null).item() == pytest.approx(by_hand.item(), rel=1e-6)


@torch.no_grad()
def test_a_dropped_caption_is_the_null_prompt_with_its_own_mask():
    view = TrigFlowView(tiny_network(), DENSE_TIME)
    batch, null = tiny_batch(4), tiny_null()
    draws = draw(0, 0, 4, LATENT, 3.0, 0.0)
    all_dropped = flow_loss(view, batch, draws._replace(dropped=torch.ones(4).bool()), null)
    expanded = batch._replace(text=null[0].expand(4, -1, -1), mask=null[1].expand(4, -1))
    assert all_dropped.item() == pytest.approx(flow_loss(view, expanded, draws, null).item(), rel=1e-6)
    conditional_mask = batch._replace(text=expanded.text)
    assert abs(all_dropped - flow_loss(view, conditional_mask, draws, null)) > 1e-4


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
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    ours, theirs = gradients(whole.network), gradients(cut.network)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-6)


def test_metrics_are_those_of_the_update(engine):
    stage = make_stage(engine)
    read = stage.update(0, tiny_batch()).read(engine)
    assert read.keys() == {"loss", "grad_norm", "skipped"}
    assert read["loss"] > 0 and read["grad_norm"] > 0 and read["skipped"] == 0


def test_an_update_without_finite_gradient_is_skipped_and_counted(engine):
    stage = make_stage(engine)
    before = snapshot(stage.network)
    bad = tiny_batch()._replace(latent=torch.full((8, *LATENT), math.nan))
    assert stage.update(0, bad).read(engine)["skipped"] == 1
    assert same(before, snapshot(stage.network))
    assert stage.update(1, tiny_batch()).read(engine)["skipped"] == 1
    assert not same(before, snapshot(stage.network))
    assert all(torch.isfinite(value).all() for value in snapshot(stage.network).values())


def test_twenty_skipped_in_a_row_stop_the_run(engine):
    stage = make_stage(engine)
    bad = tiny_batch()._replace(latent=torch.full((8, *LATENT), math.nan))
    for step in range(PATIENCE - 1):
        assert stage.update(step, bad).read(engine)["skipped"] == step + 1
    stage.update(PATIENCE, tiny_batch())  # one good update starts the count again
    for step in range(PATIENCE - 1):
        stage.update(step, bad).read(engine)
    means = stage.update(99, bad)  # reads nothing, so says nothing
    for _ in range(2):
        with pytest.raises(SprintError, match="20 updates in a row without a finite gradient"):
            means.read(engine)


def test_the_count_of_skipped_updates_survives_a_resume(engine):
    bad = tiny_batch()._replace(latent=torch.full((8, *LATENT), math.nan))
    first, second = make_stage(engine), make_stage(engine)
    for step in range(PATIENCE - 1):
        first.update(step, bad)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert (second.updater.skipped, second.updater.skipped_in_a_row) == (PATIENCE - 1, PATIENCE - 1)
    with pytest.raises(SprintError, match="20 updates in a row"):
        second.update(PATIENCE, bad).read(engine)


def test_a_skipped_update_has_its_place_in_the_schedule_and_leaves_the_optimizer(engine):
    stage = make_stage(engine)
    stage.update(0, tiny_batch())
    before = copy.deepcopy(stage.updater.state_dict())
    stage.update(1, tiny_batch()._replace(latent=torch.full((8, *LATENT), math.inf)))
    after = stage.updater.state_dict()
    assert (before["schedule"]["last_epoch"], after["schedule"]["last_epoch"]) == (1, 2)
    for number, state in before["optimizer"]["state"].items():
        assert same(state, after["optimizer"]["state"][number])
    assert (after["skipped"], after["skipped_in_a_row"]) == (1, 1)


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
    assert reads[0] == pytest.approx(reads[1], rel=1e-5)


def test_bf16_loss_is_close_to_float32(bf16_engine):
    half = make_stage(bf16_engine).update(0, tiny_batch()).read(bf16_engine)["loss"]
    network, batch, null = tiny_network(), tiny_batch(), tiny_null()
    draws = draw(0, 0, 8, LATENT, 3.0, 0.1)
    full = flow_loss(TrigFlowView(network, DENSE_TIME), batch, draws, null).item()
    assert half == pytest.approx(full, rel=0.02) and half != full
