"""Sana's network with its channels last gives what diffusers' own forwards give: value, tangent, gradients, hooks."""

import copy

import pytest
import torch
from torch import nn

from sprint.base.products import bf16_linear, use_products
from sprint.maths.dual import value_and_tangent
from sprint.models.sana.layout import Depthwise, LinearAttention, lay_channels_last
from sprint.models.student import Student
from tests.tiny import LATENT, tiny_batch, tiny_network
from tests.tolerance import assert_all_close, assert_close, of_autocast, of_network

T = torch.tensor([0.1, 0.7, 1.5])
GUIDANCE = torch.tensor([1.0, 4.5, 5.0])


def pair(dtype=torch.float32, **config) -> tuple[Student, Student]:
    theirs = Student(tiny_network(guidance_embeds=True, **config)).to(dtype)
    ours = copy.deepcopy(theirs)
    lay_channels_last(ours.network)
    return theirs, ours


def results(student: Student, dtype=torch.float32) -> tuple[dict, dict]:
    """Value, tangent and a plain forward; the gradients."""
    x_hat, text, mask = tiny_batch(3, dtype=dtype)
    t, guidance = T.to(dtype), GUIDANCE.to(dtype)

    def F(x_hat, t):
        return student(x_hat, t, text, mask, guidance)

    x_hat = x_hat.clone().requires_grad_()
    value, tangent = value_and_tangent(F, x_hat, t, x_hat.detach().flip(0), torch.sin(t))
    plain = F(x_hat, t)
    (value.square().mean() + plain.square().mean()).backward()
    grads = {name: p.grad for name, p in student.network.named_parameters()}
    return {"value": value, "tangent": tangent, "plain": plain}, grads | {"x_hat": x_hat.grad}


@pytest.mark.parametrize("config", [{}, {"qk_norm": False}, {"patch_size": 2}, {"attention_bias": True}])
def test_values_tangents_and_gradients(config):
    theirs, ours = pair(**config)
    outputs, grads = results(ours)
    expected, expected_grads = results(theirs)
    tolerance = of_network(theirs.network, passes=4)
    for name in expected:
        assert_close(outputs[name], expected[name], tolerance)
    assert_all_close(grads, expected_grads, tolerance)


def test_in_float64_they_agree_to_its_rounding():
    theirs, ours = (student.double() for student in pair())
    for mine, expected in zip(results(ours, torch.float64), results(theirs, torch.float64), strict=True):
        assert_all_close(mine, expected, 1e3 * torch.finfo(torch.float32).eps)  # attention sums in float32


def test_the_layout_is_really_in_use_and_once_is_enough():
    _, ours = pair()
    block = ours.network.transformer_blocks[0]
    assert isinstance(block.attn1.processor, LinearAttention) and isinstance(
        block.ff.conv_depth.forward, Depthwise
    )
    before, _ = results(ours)
    lay_channels_last(ours.network)
    after, _ = results(ours)
    for name in before:
        assert torch.equal(before[name], after[name])


def test_weights_and_names_stay_and_a_copy_has_its_own():
    theirs, ours = pair()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    other = copy.deepcopy(ours)
    for p in ours.parameters():
        nn.init.zeros_(p)
    expected, _ = results(theirs)
    found, _ = results(other)
    assert_close(found["plain"], expected["plain"], of_network(theirs.network))


def test_every_module_is_still_called():
    """Engines gather a layer's weights when it is called; features are recorded at calls."""
    _, ours = pair()
    called = set()
    for name, module in ours.network.named_modules():
        module.register_forward_hook(lambda module, given, out, name=name: called.add(name))
    results(ours)
    weighty = {name for name, m in ours.network.named_modules() if list(m.parameters(recurse=False))}
    assert weighty <= called


def test_a_feed_forward_that_is_not_sanas_stays_diffusers_own():
    network = tiny_network()
    for block in network.transformer_blocks:
        block.ff.residual_connection = True
    expected = copy.deepcopy(network)
    lay_channels_last(network)
    assert "forward" not in vars(network.transformer_blocks[0].ff)
    x, text, mask = tiny_batch(2)
    given = {
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "timestep": T[:2],
        "return_dict": False,
    }
    assert_close(network(x, **given)[0], expected(x, **given)[0], of_network(network))


def test_under_autocast_every_output_is_as_near_to_float32_as_theirs():
    theirs, ours = pair()
    exact, _ = results(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        found, grads = results(ours)
        expected, _ = results(theirs)
    for name in exact:
        mine, usual = ((side[name].float() - exact[name]).norm() for side in (found, expected))
        assert 0 < mine < 2 * usual
    assert all(grad.isfinite().all() for grad in grads.values())


def test_bf16_factors_in_the_blocks_alone():
    theirs, ours = pair()
    use_products(ours.network.transformer_blocks, bf16_linear)
    assert "forward" not in vars(ours.network.time_embed.linear)
    expected, expected_grads = results(theirs)
    found, grads = results(ours)
    tolerance = of_autocast(theirs.network)
    for name in ("value", "plain", "tangent"):
        assert 0 < (found[name] - expected[name]).norm() < 3 * tolerance * expected[name].norm()
        assert found[name].dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    cosine = torch.cosine_similarity(
        *(torch.cat([g[k].flatten() for k in sorted(g)]) for g in (grads, expected_grads)), 0
    )
    assert cosine > 1 - tolerance
    assert found["plain"].shape == (3, *LATENT)
