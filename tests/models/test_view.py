import math

import pytest
import torch

from sprint.maths.trigflow import HALF_PI, flow_time, to_flow_input, to_flow_velocity
from sprint.models.guidance import guided_velocity, with_null
from sprint.models.teacher import DENSE_TIME, SPARSE_TIME
from sprint.models.view import TrigFlowView
from tests.tiny import tiny_batch, tiny_network, tiny_null
from tests.tolerance import assert_close, of_autocast, of_network


def inputs(dtype=torch.float32):
    x_hat, text, mask = tiny_batch(4, dtype=dtype)
    return x_hat, torch.tensor([0.01, 0.5, 1.2, HALF_PI], dtype=dtype), text, mask


@torch.no_grad()
def test_the_flow_velocity_comes_back_from_the_view(true_float64):
    """The view changes the clock and nothing else."""
    view = TrigFlowView(tiny_network().double(), SPARSE_TIME)
    x_hat, t, text, mask = inputs(torch.float64)
    t_fm = flow_time(t)
    x_fm = to_flow_input(x_hat, t_fm)
    F, v = view(x_hat, t, text, mask), view.flow_velocity(x_fm, t_fm, text, mask)
    assert_close(to_flow_velocity(F, x_fm, t_fm), v, of_network(view))
    assert (F - v).norm() > 0.1 * v.norm()


@torch.no_grad()
def test_at_the_ends_the_view_is_the_network_itself():
    """t = 0: F = x + v. t = π/2: F = −x + v, with x_fm = x_hat at both."""
    view = TrigFlowView(tiny_network(), DENSE_TIME)
    x_hat, text, mask = tiny_batch(2)
    for t, sign in ((0.0, 1), (HALF_PI, -1)):
        t = torch.full((2,), t)
        v = view.flow_velocity(x_hat, flow_time(t), text, mask)
        assert_close(view(x_hat, t, text, mask), sign * x_hat + v, of_network(view))


@pytest.mark.parametrize("time_scale", [SPARSE_TIME, DENSE_TIME])
@torch.no_grad()
def test_the_embedder_gets_scaled_flow_time_and_scaled_guidance(time_scale, monkeypatch):
    network = tiny_network(guidance_embeds=True)
    seen = {}
    network.time_embed.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(t=args[0], guidance=kwargs["guidance"]), with_kwargs=True
    )
    x_hat, text, mask = tiny_batch(2)
    t = torch.tensor([math.pi / 4, HALF_PI])
    TrigFlowView(network, time_scale)(x_hat, t, text, mask, torch.tensor([4.5, 5.0]))
    assert seen["t"].tolist() == pytest.approx([0.5 * time_scale, time_scale])
    assert seen["guidance"].tolist() == pytest.approx([0.45, 0.5])


@torch.no_grad()
def test_padding_is_not_seen_and_real_tokens_are():
    view = TrigFlowView(tiny_network(), DENSE_TIME)
    x_hat, t, text, mask = inputs()
    F = view(x_hat, t, text, mask)
    padded = torch.where(mask[..., None] == 0, text + 10, text)
    assert_close(view(x_hat, t, padded, mask), F, of_network(view))
    assert (view(x_hat, t, text.flip(0), mask) - F).norm() > 1e-3 * F.norm()


@torch.no_grad()
def test_a_bf16_network_gives_float32_close_to_the_float32_one():
    x_hat, t, text, mask = inputs()
    F = TrigFlowView(tiny_network(), DENSE_TIME)(x_hat, t, text, mask)
    half = TrigFlowView(tiny_network().to(torch.bfloat16), DENSE_TIME)(x_hat, t, text, mask)
    assert half.dtype == torch.float32
    assert 1e-5 < ((half - F).norm() / F.norm()).item() < of_autocast(tiny_network())


def test_half_precision_time_is_refused():
    x_hat, t, text, mask = inputs()
    with pytest.raises(TypeError, match=r"not torch\.bfloat16"):
        TrigFlowView(tiny_network(), DENSE_TIME)(x_hat, t.bfloat16(), text, mask)


# ---- guidance ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_guidance_by_hand_each_branch_with_its_own_mask():
    view = TrigFlowView(tiny_network(), DENSE_TIME)
    x_hat, t, text, mask = inputs()
    null_text, null_mask = tiny_null()
    w = torch.tensor([0.0, 1.0, 4.5, 2.0])
    F = guided_velocity(view, x_hat, t, with_null(text, mask, null_text, null_mask), w)
    F_c = view(x_hat, t, text, mask)
    F_u = view(x_hat, t, null_text.expand(4, -1, -1), null_mask.expand(4, -1))
    expected = F_u + w[:, None, None, None] * (F_c - F_u)
    guided = (2 * w.max().item() + 1) * of_network(view)  # w F_c and (1 − w) F_u err apart
    assert_close(F, expected, guided)
    assert_close(F[0], F_u[0], guided)
    assert_close(F[1], F_c[1], guided)

    wrong = with_null(text, mask, null_text, torch.ones_like(null_mask))
    wrong = guided_velocity(view, x_hat, t, wrong, w)
    assert (wrong[2] - F[2]).norm() > 1e-2 * F[2].norm()
