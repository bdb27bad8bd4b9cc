"""Tiny networks and checkpoints for the conversion tests."""

import pytest
import torch
from diffusers import SanaTransformer2DModel

from sprint.base.errors import SprintError
from sprint.models.sana.presets import transformer_config
from sprint.weights.convert import convert

DEPTH = 3


def tiny_config(**traits) -> dict:
    return transformer_config("tiny", **traits) | {"num_layers": DEPTH, "caption_channels": 24}


def network(seed: int = 0, **changes) -> SanaTransformer2DModel:
    """A random network whose every parameter differs from every other."""
    torch.manual_seed(seed)
    net = SanaTransformer2DModel(**tiny_config() | changes).eval()
    for name, p in net.named_parameters():
        p.data = torch.randn_like(p) * 0.1 + ("norm" in name)
    return net


def to_original(net: SanaTransformer2DModel) -> dict[str, torch.Tensor]:
    """Sana's names by text substitution: a second, independent writing of the map, for the tests."""
    state = dict(net.state_dict())
    out = {}
    for i in range(net.config.num_layers):
        a, b = f"transformer_blocks.{i}.attn1.", f"transformer_blocks.{i}.attn2."
        out[f"blocks.{i}.attn.qkv.weight"] = torch.cat([state.pop(f"{a}to_{x}.weight") for x in "qkv"])
        for kind in ("weight", "bias"):
            out[f"blocks.{i}.cross_attn.kv_linear.{kind}"] = torch.cat(
                [state.pop(f"{b}to_{x}.{kind}") for x in "kv"]
            )
    words = [
        ("transformer_blocks.", "blocks."),
        ("patch_embed", "x_embedder"),
        ("caption_projection.linear_", "y_embedder.y_proj.fc"),
        ("caption_norm", "attention_y_norm"),
        ("time_embed.emb.timestep_embedder", "t_embedder"),
        ("time_embed.timestep_embedder", "t_embedder"),
        ("time_embed.guidance_embedder", "cfg_embedder"),
        ("embedder.linear_1", "embedder.mlp.0"),
        ("embedder.linear_2", "embedder.mlp.2"),
        ("time_embed.linear", "t_block.1"),
        ("proj_out", "final_layer.linear"),
        ("attn1.to_out.0", "attn.proj"),
        ("attn2.to_out.0", "cross_attn.proj"),
        ("attn2.to_q", "cross_attn.q_linear"),
        ("attn1.norm_q", "attn.q_norm"),
        ("attn1.norm_k", "attn.k_norm"),
        ("attn2.norm_q", "cross_attn.q_norm"),
        ("attn2.norm_k", "cross_attn.k_norm"),
    ]
    for key, tensor in state.items():
        for theirs, ours in words:
            key = key.replace(theirs, ours)
        if ".ff.conv_" in key:
            kind = key.split(".ff.conv_")[1].split(".")[0]
            key = key.replace(f".ff.conv_{kind}", f".mlp.{kind}_conv.conv")
        out["final_layer.scale_shift_table" if key == "scale_shift_table" else key] = tensor
    return {key: tensor.contiguous() for key, tensor in out.items()}


def with_buffers(state: dict) -> dict:
    """What real files also carry."""
    return state | {"y_embedder.y_embedding": torch.randn(300, 24), "pos_embed": torch.randn(1, 64, 128)}


def output(net: SanaTransformer2DModel) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    guidance = torch.tensor([0.45, 0.4]) if net.config.guidance_embeds else None
    x = torch.randn(2, net.config.in_channels, 8, 8, generator=random)
    text = torch.randn(2, 5, net.config.caption_channels, generator=random)
    with torch.no_grad():
        return net(x, text, torch.tensor([700.0, 20.0]), guidance=guidance, return_dict=False)[0]


def same_bits(a: dict, b: dict) -> bool:
    def bits(t):
        return t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8).tolist()

    return a.keys() == b.keys() and all(bits(a[key]) == bits(b[key]) for key in a)


def quiet(*args, **kwargs):
    return convert(*args, progress=False, **kwargs)


def left_behind(here) -> set[str]:
    return {path.name for path in here.iterdir()}


def refuses(here, match: str, *args, **kwargs) -> None:
    """One line with these words, and the folder as it was."""
    before = left_behind(here)
    with pytest.raises(SprintError, match=match) as error:
        quiet(*args, **kwargs)
    assert "\n" not in str(error.value)
    assert left_behind(here) == before
