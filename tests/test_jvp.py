import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sprint.jvp import value_and_tangent
from sprint.models.student import Student
from sprint.models.view import DENSE_TIME, SPARSE_TIME, TrigFlowView
from tests.tiny import tiny_batch, tiny_network


def directions(x_hat: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(x_hat.shape, generator=generator, dtype=x_hat.dtype),
        torch.randn(t.shape, generator=generator, dtype=t.dtype),
    )


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("time_scale", [DENSE_TIME, SPARSE_TIME])
def test_tangent_is_the_central_difference(true_float64, qk_norm, time_scale):
    view = TrigFlowView(tiny_network(qk_norm=qk_norm).double(), time_scale)
    x_hat, text, mask = tiny_batch(3, dtype=torch.float64)
    t = torch.tensor([0.1, 0.7, math.pi / 2 - 0.01], dtype=torch.float64)
    v_x, v_t = directions(x_hat, t)

    def F(x_hat, t):
        return view(x_hat, t, text, mask)

    _, tangent = value_and_tangent(F, x_hat, t, v_x, v_t)
    h = 1e-5 if time_scale == DENSE_TIME else 1e-7
    with torch.no_grad():
        difference = (F(x_hat + h * v_x, t + h * v_t) - F(x_hat - h * v_x, t - h * v_t)) / (2 * h)
    assert difference.norm() > 0.1
    assert ((tangent - difference).norm() / difference.norm()).item() < 1e-7


def test_tangent_sees_position_and_time_apart(true_float64):
    """Linear in (v_x, v_t), and neither part is zero."""
    view = TrigFlowView(tiny_network().double(), DENSE_TIME)
    x_hat, text, mask = tiny_batch(2, dtype=torch.float64)
    t = torch.tensor([0.4, 1.2], dtype=torch.float64)
    v_x, v_t = directions(x_hat, t)

    def tangent(v_x, v_t):
        return value_and_tangent(lambda x, t: view(x, t, text, mask), x_hat, t, v_x, v_t)[1]

    by_x, by_t = tangent(v_x, 0 * v_t), tangent(0 * v_x, v_t)
    assert by_x.norm() > 0.1 and by_t.norm() > 0.1
    torch.testing.assert_close(2 * by_x - 3 * by_t, tangent(2 * v_x, -3 * v_t), rtol=0, atol=1e-12)


def test_value_and_its_gradient_are_those_of_a_plain_forward():
    student = Student(tiny_network(guidance_embeds=True))
    x_hat, text, mask = tiny_batch(3)
    t, guidance = torch.tensor([0.1, 0.7, 1.5]), torch.tensor([4.0, 4.5, 5.0])

    def F(x_hat, t):
        return student(x_hat, t, text, mask, guidance)

    def gradients(value):
        student.zero_grad()
        value.square().mean().backward()
        return {name: p.grad.clone() for name, p in student.network.named_parameters()}

    value, tangent = value_and_tangent(F, x_hat, t, *directions(x_hat, t))
    plain = F(x_hat, t)
    assert torch.equal(value, plain)
    assert not tangent.requires_grad and tangent.norm() > 0
    ours, theirs = gradients(value), gradients(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(g.norm() > 0 for g in theirs.values())


def value_gradient_and_tangent(checkpointing: bool) -> tuple[torch.Tensor, torch.Tensor]:
    network = tiny_network().train()
    if checkpointing:
        network.enable_gradient_checkpointing()
    view = TrigFlowView(network, DENSE_TIME)
    x_hat, text, mask = tiny_batch(2)
    t = torch.tensor([0.4, 1.2])
    value, tangent = value_and_tangent(lambda x, t: view(x, t, text, mask), x_hat, t, *directions(x_hat, t))
    value.mean().backward()
    return network.patch_embed.proj.weight.grad, tangent


def test_tangent_with_activation_checkpointing_is_the_same():
    (gradient, tangent), (checkpointed, same_tangent) = map(value_gradient_and_tangent, (False, True))
    assert torch.equal(tangent, same_tangent)
    torch.testing.assert_close(gradient, checkpointed)


@torch.no_grad()
def test_self_attention_stays_linear_under_the_mathematical_kernel():
    """What makes the tangent possible changes softmax attention's kernel, and nothing else."""
    network = tiny_network()
    view = TrigFlowView(network, DENSE_TIME)
    x_hat, text, mask = tiny_batch(2)
    t = torch.tensor([0.4, 1.2])
    plain = view(x_hat, t, text, mask)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(view(x_hat, t, text, mask), plain, rtol=1e-5, atol=1e-6)

    for block in network.transformer_blocks:  # the trap: softmax in place of linear attention
        block.attn1.processor = block.attn2.processor
    assert (view(x_hat, t, text, mask) - plain).norm() > 1e-3 * plain.norm()


@torch.no_grad()
def test_linear_attention_by_hand():
    """out = Σ_j (relu q · relu k_j) v_j / Σ_j (relu q · relu k_j), head by head."""
    network = tiny_network(qk_norm=False)
    attention = network.transformer_blocks[0].attn1
    x_BND = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    q, k, v = (
        layer(x_BND).unflatten(2, (2, 16)).transpose(1, 2)
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    weights = torch.relu(q) @ torch.relu(k).transpose(2, 3)
    out = (weights / weights.sum(-1, keepdim=True)) @ v
    expected = attention.to_out[0](out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x_BND), expected, rtol=1e-4, atol=1e-5)


def test_tangent_of_a_function_known_by_heart():
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(layer.weight, 3.0)

    def F(x, t):
        return layer(x) * torch.sin(t)

    x, t = torch.tensor([2.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    v_x, v_t = torch.tensor([0.7], dtype=torch.float64), torch.tensor([-0.2], dtype=torch.float64)
    value, tangent = value_and_tangent(F, x, t, v_x, v_t)
    assert value.item() == pytest.approx(6 * math.sin(0.5), abs=1e-12)
    assert tangent.item() == pytest.approx(3 * 0.7 * math.sin(0.5) - 6 * 0.2 * math.cos(0.5), abs=1e-12)
    value.backward()
    assert layer.weight.grad.item() == pytest.approx(2 * math.sin(0.5), abs=1e-12)
