"""Generality of `sprint.maths.dual`: unmodified diffusers networks of families that people distil, tiny and random."""

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from sprint.maths.dual import value_and_tangent
from tests.tiny import tiny_network

BATCH, TOKENS, TEXT_WIDTH = 2, 5, 8
T = [0.3, 0.8]


def unequal(network: torch.nn.Module) -> torch.nn.Module:
    """No two weights alike, so nothing that should matter is zero."""
    generator = torch.Generator().manual_seed(1)
    for name, p in network.named_parameters():
        is_scale = "norm" in name and name.endswith("weight") and p.ndim == 1
        p.data = 0.15 * torch.randn(p.shape, generator=generator) + is_scale
    return network.eval()


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def sana(guidance: bool, qk_norm: bool):
    network = tiny_network(guidance_embeds=guidance, qk_norm=qk_norm)
    mask = torch.ones(BATCH, TOKENS)
    mask[0, 3:] = 0

    def F(x, t):
        return network(
            x,
            encoder_hidden_states=numbers(BATCH, TOKENS, TEXT_WIDTH, dtype=x.dtype),
            encoder_attention_mask=mask,
            timestep=t,
            guidance=torch.tensor([0.4, 0.5], dtype=x.dtype) if guidance else None,
            return_dict=False,
        )[0]

    return network, F, (BATCH, 4, 4, 4)


def sd3():
    """Joint attention of picture and text, RMS QK-norm, one block with a second attention."""
    network = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )

    def F(x, t):
        text = numbers(BATCH, TOKENS, TEXT_WIDTH, dtype=x.dtype)
        pooled = numbers(BATCH, 8, dtype=x.dtype)
        return network(x, text, pooled, t, return_dict=False)[0]

    return unequal(network), F, (BATCH, 4, 4, 4)


def flux():
    """A double and a single block, real rotary embeddings, guidance."""
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    places = torch.tensor([[0, i // 3, i % 3] for i in range(6)])

    def F(x, t):
        return network(
            x,
            encoder_hidden_states=numbers(BATCH, TOKENS, TEXT_WIDTH, dtype=x.dtype),
            pooled_projections=numbers(BATCH, 8, dtype=x.dtype),
            timestep=t / 1000,  # the network multiplies by 1000
            img_ids=places,
            txt_ids=torch.zeros(TOKENS, 3),
            guidance=torch.tensor([0.003, 0.004], dtype=x.dtype),
            return_dict=False,
        )[0]

    return unequal(network), F, (BATCH, 6, 4)


def pixart():
    """adaLN-single, GELU, masked cross-attention, learned variance in half of the output."""
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=4,
        patch_size=2,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )
    mask = torch.ones(BATCH, TOKENS)
    mask[0, 3:] = 0

    def F(x, t):
        return network(
            x,
            encoder_hidden_states=numbers(BATCH, TOKENS, TEXT_WIDTH, dtype=x.dtype),
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]

    return unequal(network), F, (BATCH, 4, 4, 4)


FAMILIES = {
    "sana": lambda: sana(guidance=False, qk_norm=True),
    "sana, guidance": lambda: sana(guidance=True, qk_norm=True),
    "sana, no qk-norm": lambda: sana(guidance=False, qk_norm=False),
    "sana, guidance, no qk-norm": lambda: sana(guidance=True, qk_norm=False),
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
}


def relative_error(F, shape, dtype) -> float:
    """Of the tangent, to torch.func.jvp's."""
    x, t = numbers(*shape, dtype=dtype), torch.tensor(T, dtype=dtype)
    v_x, v_t = numbers(*shape[::-1], dtype=dtype).reshape(shape), torch.tensor([0.7, -0.4], dtype=dtype)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        _, expected = torch.func.jvp(F, (x, t), (v_x, v_t))
        _, by_time = torch.func.jvp(F, (x, t), (0 * v_x, v_t))
    assert expected.norm() > 0.1 and by_time.norm() > 1e-3
    _, tangent = value_and_tangent(F, x, t, v_x, v_t)
    assert tangent.dtype == expected.dtype == dtype
    return ((tangent - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_tangent_in_float64(true_float64, name):
    network, F, shape = FAMILIES[name]()
    network.double()
    assert relative_error(F, shape, torch.float64) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_tangent_in_float32(name):
    _, F, shape = FAMILIES[name]()
    assert relative_error(F, shape, torch.float32) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_value_and_gradients_are_the_plain_forwards_bit_by_bit(name):
    network, F, shape = FAMILIES[name]()
    x, t = numbers(*shape), torch.tensor(T)
    value, _ = value_and_tangent(F, x, t, torch.ones_like(x), torch.ones_like(t))
    plain = F(x, t)
    assert torch.equal(value, plain)
    named = dict(network.named_parameters())
    ours, theirs = (
        torch.autograd.grad(y.square().mean(), [*named.values()], allow_unused=True) for y in (value, plain)
    )
    for name, a, b in zip(named, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name


def test_a_network_that_writes_into_buffers_is_refused_by_name():
    """Lumina2 joins text and picture in place."""
    network = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16),
        cap_feat_dim=TEXT_WIDTH,
    ).eval()
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)

    def F(x, t):
        return network(x, t, numbers(BATCH, TOKENS, TEXT_WIDTH), mask, return_dict=False)[0]

    x, t = numbers(BATCH, 4, 4, 4), torch.tensor(T)
    with pytest.raises(NotImplementedError, match=r"Tensor\.__setitem__"):
        value_and_tangent(F, x, t, x, t)


def test_the_networks_are_diffusers_own():
    assert all(type(FAMILIES[name]()[0]).__module__.startswith("diffusers.") for name in FAMILIES)
    assert type(FAMILIES["sana"]()[0]) is SanaTransformer2DModel
