"""Additions of low rank, and the fake score that is made of them."""

import pytest
import torch
from torch import nn

from sprint.engine.compiled import prepare_blocks
from sprint.models.fake_score import FakeScore, LowRankFakeScore
from sprint.models.low_rank import LowRank, add_low_rank, twin
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from tests.tiny import tiny_batch, tiny_network
from tests.tolerance import assert_all_close, assert_close, of_network

T, W = torch.linspace(0.2, 1.4, 8), torch.full((8,), 4.5)


def moved(additions: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in additions.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))


def called(fake_score, batch=None):
    latent, text, mask = batch or tiny_batch()
    return fake_score(latent, T, text, mask, W)


def test_the_sum_by_hand():
    weight = torch.arange(6.0).reshape(2, 3, 1, 1)
    added = LowRank(weight, rank=1)
    assert torch.equal(added(weight), weight)  # B is zero
    with torch.no_grad():
        added.A.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        added.B.copy_(torch.tensor([[10.0], [-1.0]]))
    assert added(weight).flatten().tolist() == [10, 21, 32, 2, 2, 2]


def test_a_small_addition_to_a_bf16_weight_is_not_lost():
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    added = LowRank(weight, rank=1)
    with torch.no_grad():
        added.A.fill_(1), added.B.fill_(1e-4)
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                assert added(weight).item() == pytest.approx(1.0001, abs=1e-6)


def test_every_product_of_the_blocks_gets_one_and_depthwise_convolutions_none():
    network = tiny_network()
    before = {name for name, _ in network.named_parameters()}
    additions = add_low_rank(network.transformer_blocks, 2)
    assert len(additions) == 2 * (8 + 2)
    after = {
        name.replace("parametrizations.weight.original", "weight") for name, _ in network.named_parameters()
    }
    assert before == {name for name in after if ".parametrizations." not in name}
    assert not any("conv_depth.param" in name for name, _ in network.named_parameters())
    assert len(add_low_rank(nn.Linear(3, 5), 64)[0].A) == 3  # no rank above that of the weight


def test_a_twin_shares_weights_and_not_modules():
    network = tiny_network()
    other = twin(network)
    for (name, p), (_, q) in zip(network.named_parameters(), other.named_parameters(), strict=True):
        assert p is q, name
    assert not {*map(id, network.modules())} & {*map(id, other.modules())}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["full", "added"])
def test_it_begins_as_the_teacher_and_leaves_it_alone(kind):
    network = tiny_network()
    teacher, batch = TrigFlowView(network, DENSE_TIME), tiny_batch()
    expected = teacher(batch.latent, T, batch.text, batch.mask)
    full = kind == "full"
    fake_score = FakeScore(network, DENSE_TIME) if full else LowRankFakeScore(network, 2, DENSE_TIME)
    assert_close(called(fake_score), expected, of_network(network))
    moved(fake_score)
    assert (called(fake_score) - expected).abs().max() > 0.01
    assert torch.equal(teacher(batch.latent, T, batch.text, batch.mask), expected)


@torch.no_grad()
def test_only_a_network_of_its_own_is_told_the_guidance():
    network, batch = tiny_network(), tiny_batch()
    for fake_score, told in (
        (FakeScore(network, DENSE_TIME), True),
        (LowRankFakeScore(network, 2, DENSE_TIME), False),
    ):
        moved(fake_score)
        one, other = (fake_score(batch.latent, T, batch.text, batch.mask, w * W) for w in (1, 0.5))
        assert torch.equal(one, other) != told


def test_gradients_are_those_of_merged_weights():
    """∂L/∂B = ∂L/∂W · Aᵀ and ∂L/∂A = Bᵀ · ∂L/∂W, ∂L/∂W of a network that has the sums for weights."""
    network = tiny_network().requires_grad_(False)
    added = LowRankFakeScore(network, 2, DENSE_TIME)
    moved(added)
    called(added).square().sum().backward()
    merged = tiny_network()
    layers = [
        (layer, name) for name, layer in added.network.named_modules() if hasattr(layer, "parametrizations")
    ]
    with torch.no_grad():
        for layer, name in layers:
            merged.get_submodule(name).weight.copy_(layer.weight)
    batch = tiny_batch()
    TrigFlowView(merged, DENSE_TIME)(batch.latent, T, batch.text, batch.mask).square().sum().backward()
    found, expected = {}, {}
    for layer, name in layers:
        (low_rank,) = layer.parametrizations.weight
        gradient = merged.get_submodule(name).weight.grad.flatten(1)
        found |= {f"{name}.A": low_rank.A.grad, f"{name}.B": low_rank.B.grad}
        expected |= {
            f"{name}.A": low_rank.B.detach().T @ gradient,
            f"{name}.B": gradient @ low_rank.A.detach().T,
        }
    assert_all_close(found, expected, of_network(merged, passes=4))
    assert all(p.grad is None for p in network.parameters())


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        added = LowRankFakeScore(tiny_network().requires_grad_(False), 2, DENSE_TIME)
        moved(added)
        prepare_blocks(added.network, compiled=False, recompute=recompute)
        added.network.train()
        called(added).square().sum().backward()
        gradients.append({name: p.grad for name, p in added.named_parameters()})
    assert_all_close(gradients[1], gradients[0], of_network(added.network, passes=2))


@pytest.mark.slow
def test_compiled_blocks_have_their_own_additions():
    """They share their graphs: each block's weights and additions are what a graph is called with."""
    outputs, gradients = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        added = LowRankFakeScore(tiny_network().requires_grad_(False), 2, DENSE_TIME)
        moved(added)
        prepare_blocks(added.network, compiled, recompute=False)
        F = called(added)
        F.square().sum().backward()
        outputs.append(F.detach())
        gradients.append({name: p.grad for name, p in added.named_parameters()})
    assert_close(outputs[1], outputs[0], of_network(added.network))
    assert_all_close(gradients[1], gradients[0], of_network(added.network, passes=4))
