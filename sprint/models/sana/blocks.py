"""What is where inside of diffusers' `SanaTransformer2DModel`, and how it is called."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from sprint.models.sana.presets import student_config
from sprint.models.teacher import QK

GUIDANCE_STD = 0.02


def velocity(
    network: SanaTransformer2DModel,
    x_fm: Tensor,
    t_fm: Tensor,
    text: Tensor,
    mask: Tensor | None,
    guidance: Tensor | None,
    time_scale: float,
) -> Tensor:
    """The network's own prediction.  -> v [B, C, H, W]"""
    (v,) = network(
        x_fm,
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        timestep=t_fm * time_scale,
        guidance=None if guidance is None else guidance * network.config.guidance_embeds_scale,
        return_dict=False,
    )
    return v


def blocks(network: SanaTransformer2DModel) -> nn.ModuleList:
    return network.transformer_blocks


@contextmanager
def only_first(network: SanaTransformer2DModel, count: int) -> Iterator[None]:
    """Inside, the network has `count` blocks: the list is cut, since nothing may leave a forward half way."""
    blocks = network.transformer_blocks
    network.transformer_blocks = blocks[:count]
    try:
        yield
    finally:
        network.transformer_blocks = blocks


# ---- time and guidance ------------------------------------------------------------------------------


def time_embedder(network: SanaTransformer2DModel) -> nn.Module:
    return network.time_embed


def time_mlp(network: SanaTransformer2DModel) -> tuple[TimestepEmbedding, Timesteps]:
    mlp = network.time_embed.emb.timestep_embedder
    return mlp, Timesteps(mlp.linear_1.in_features, flip_sin_to_cos=True, downscale_freq_shift=0)


def keep_time_in_float32(network: SanaTransformer2DModel) -> None:
    network.time_embed.forward = MethodType(_forward_in_float32, network.time_embed)


def _forward_in_float32(embed: nn.Module, timestep: Tensor, hidden_dtype=None, **conditions):
    with torch.autocast(timestep.device.type, enabled=False):
        return type(embed).forward(embed, timestep, hidden_dtype=torch.float32, **conditions)


def embed_time(network: SanaTransformer2DModel, t_fm: Tensor, guidance: Tensor, time_scale: float) -> Tensor:
    scaled = guidance * network.config.guidance_embeds_scale
    _, embedded = network.time_embed(t_fm * time_scale, guidance=scaled, hidden_dtype=network.dtype)
    return embedded


def student_of(adapted: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """The adapted weights in a network that also embeds guidance; at the start it has no effect.

    The new embedder's first layer is random and its last zero: all-zero in both could never learn.
    """
    student = SanaTransformer2DModel.from_config(student_config(adapted.config))
    embedder = student.time_embed.guidance_embedder
    nn.init.normal_(embedder.linear_1.weight, std=GUIDANCE_STD)
    for zero in (embedder.linear_1.bias, embedder.linear_2.weight, embedder.linear_2.bias):
        nn.init.zeros_(zero)
    old = "time_embed.emb.timestep_embedder."
    weights = {
        key.replace(old, "time_embed.timestep_embedder."): value
        for key, value in adapted.state_dict().items()
    }
    missing, unexpected = student.load_state_dict(weights, strict=False)
    strays = [key for key in missing if not key.startswith("time_embed.guidance_embedder.")]
    if strays or unexpected:
        raise ValueError(f"weights that do not fit: {[*strays, *unexpected][:3]}")
    return student.to(torch.float32)


# ---- queries and keys ---------------------------------------------------------------------------------


def qk(network: SanaTransformer2DModel) -> list[QK]:
    return [
        QK(name, name.replace(".to_", ".norm_") + ".weight", name.endswith(".attn2.to_k"))
        for name, _ in network.named_modules()
        if name.endswith((".to_q", ".to_k"))
    ]


# ---- a block that adds nothing --------------------------------------------------------------------------


def output_projections(block: nn.Module) -> list[str]:
    """Of self-attention, cross-attention and feed-forward; the last has no bias."""
    ends = ("attn1.to_out.0.", "attn2.to_out.0.", "ff.conv_point.")
    return [name for name, _ in block.named_parameters() if name.startswith(ends)]
