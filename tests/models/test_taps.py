import math

import pytest
import torch
from diffusers import SanaTransformer2DModel

from sprint.base.errors import SprintError
from sprint.models.taps import TappedTeacher
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from tests.tolerance import assert_close, central, near, of_network

DEPTH, WIDTH = 3, 64


def make_view(
    dtype: torch.dtype = torch.float32, qk_norm: str | None = "rms_norm_across_heads"
) -> TrigFlowView:
    torch.manual_seed(0)
    network = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=DEPTH,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=WIDTH,
        caption_channels=8,
        sample_size=4,
        qk_norm=qk_norm,
    )
    return TrigFlowView(network.to(dtype), DENSE_TIME)


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x_hat = torch.randn(2, 4, 4, 4, generator=generator, dtype=dtype)
    text = torch.randn(2, 5, 8, generator=generator, dtype=dtype)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return x_hat, torch.tensor([0.4, math.pi / 2], dtype=dtype), text, mask


def block_outputs(view: TrigFlowView, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    outputs = []
    handles = [
        block.register_forward_hook(lambda block, args, output: outputs.append(output))
        for block in view.network.transformer_blocks
    ]
    view(*inputs)
    for handle in handles:
        handle.remove()
    return outputs


def hook_count(view: TrigFlowView) -> int:
    return sum(len(module._forward_hooks) for module in view.modules())


@pytest.mark.parametrize("taps", [(0, 2), (2, 0), (1,), (0, 1, 2)])
def test_features_are_the_block_outputs_in_the_order_asked(taps):
    view, inputs = make_view(), make_inputs()
    outputs = block_outputs(view.eval(), inputs)
    features = TappedTeacher(view, taps)(*inputs)
    assert len(features) == len(taps)
    for tap, feature in zip(taps, features, strict=True):
        assert feature.shape == (2, 16, WIDTH)
        assert torch.equal(feature, outputs[tap])


def test_blocks_after_the_last_tap_are_not_called():
    view = make_view()
    calls = []
    for number, block in enumerate(view.network.transformer_blocks):
        block.register_forward_pre_hook(lambda block, args, number=number: calls.append(number))
    view.network.proj_out.register_forward_pre_hook(lambda block, args: calls.append("out"))
    TappedTeacher(view, (0, 1))(*make_inputs())
    assert calls == [0, 1, "out"]  # what stands behind the blocks is a few channels


def test_the_forward_ends_as_any_other_and_the_blocks_are_all_back():
    """A sharded network's hooks behind the forward must run, and find every block."""
    view, inputs = make_view(), make_inputs()
    blocks, ended, plain = view.network.transformer_blocks, [], view(*inputs)
    handle = view.network.register_forward_hook(lambda module, args, output: ended.append(module))
    TappedTeacher(view, (0,))(*inputs)
    handle.remove()
    assert ended == [view.network]
    assert view.network.transformer_blocks is blocks and len(blocks) == DEPTH
    assert torch.equal(view(*inputs), plain)


@pytest.mark.parametrize("tap", [-1, 3, 19])
def test_a_tap_outside_the_network_is_named_with_the_depth(tap):
    with pytest.raises(SprintError, match=rf"taps = \[0, {tap}\], but the teacher's blocks are 0 to 2"):
        TappedTeacher(make_view(), (0, tap))


def test_no_tap_is_an_error():
    with pytest.raises(SprintError, match=r"taps = \[\], but the teacher's blocks are 0 to 2"):
        TappedTeacher(make_view(), ())


def test_gradient_to_the_input_matches_finite_differences(monkeypatch):
    """In true float64: diffusers' attention, and its RMSNorm if there is one, step down to float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    view = make_view(torch.float64, qk_norm=None)
    tapped = TappedTeacher(view, (0, 2))
    x_hat, t, text, mask = make_inputs(torch.float64)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(2, 16, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]
    direction = torch.randn(x_hat.shape, generator=generator, dtype=torch.float64)

    def total(x):
        return sum((w * f).sum() for w, f in zip(weights, tapped(x, t, text, mask), strict=True))

    x_hat.requires_grad_(True)
    (gradient,) = torch.autograd.grad(total(x_hat), x_hat)
    h = 1e-5
    with torch.no_grad():
        difference = (total(x_hat + h * direction) - total(x_hat - h * direction)) / (2 * h)
    assert (gradient * direction).sum().item() == near(
        difference.item(),
        central(h, of_network(view)),
        scale=max(difference.abs(), total(x_hat).abs()).item(),
    )


def test_teacher_parameters_take_no_gradient():
    view = make_view().train()
    tapped = TappedTeacher(view, (2,))
    x_hat, t, text, mask = make_inputs()
    x_hat.requires_grad_(True)
    tapped(x_hat, t, text, mask)[0].sum().backward()
    assert x_hat.grad.norm() > 0
    assert all(p.grad is None for p in view.parameters())
    assert not view.training


def test_gradient_checkpointing_gives_the_same_gradient():
    gradients = []
    for checkpointing in (False, True):
        view, (x_hat, t, text, mask) = make_view(), make_inputs()
        if checkpointing:
            view.network.enable_gradient_checkpointing()
        x_hat.requires_grad_(True)
        TappedTeacher(view, (0, 2))(x_hat, t, text, mask)[1].square().sum().backward()
        gradients.append(x_hat.grad)
    assert_close(*gradients, of_network(view, passes=3))


def test_hooks_are_gone_and_the_blocks_back_after_success_and_after_failure():
    view, (x_hat, t, text, mask) = make_view(), make_inputs()
    tapped = TappedTeacher(view, (0, 1))
    before, blocks = hook_count(view), view.network.transformer_blocks
    tapped(x_hat, t, text, mask)
    assert hook_count(view) == before
    with pytest.raises(RuntimeError):
        tapped(x_hat, t, text[:, :, :3], mask)
    assert hook_count(view) == before and view.network.transformer_blocks is blocks
    assert view(x_hat, t, text, mask).shape == x_hat.shape


def test_features_of_a_bf16_teacher_are_float32():
    features = TappedTeacher(make_view(torch.bfloat16), (1,))(*make_inputs())
    assert features[0].dtype == torch.float32
