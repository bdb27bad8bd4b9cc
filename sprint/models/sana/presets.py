"""Sana's sizes as rows, and the network that a set of tensor shapes describes.

The network is diffusers' `SanaTransformer2DModel`; a "config" is the dict of its constructor's arguments.
Sources: SANA (arXiv 2410.10629, Table 1), SANA-1.5 (arXiv 2501.18427), SANA-Sprint (arXiv 2503.09641).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mode

import torch
from diffusers import SanaTransformer2DModel

from sprint.base.errors import SprintError
from sprint.models.sana.keys import KEYS
from sprint.models.teacher import DENSE_TIME, SPARSE_TIME, Shape, Sizes

HEAD_DIM = 32  # of linear self-attention, in every Sana
QK_NORM = "rms_norm_across_heads"
SIZED = "1.6b"  # its base teachers are for 512 px to 4K, and weights look alike
BLOCK_NUMBER = re.compile(r"transformer_blocks\.(\d+)\.")


@dataclass(frozen=True)
class Preset:
    """One size. `heads` are of self-attention (32 wide each); `time_scale` is that of its base teachers."""

    name: str
    depth: int
    width: int
    heads: int
    cross_heads: int
    caption_channels: int
    in_channels: int
    sample_size: int
    patch_size: int
    time_scale: float


PRESETS = {
    row.name: row
    for row in (
        #       name  depth width heads cross caption  in  sample patch  time
        Preset("tiny", 4, 128, 4, 4, 128, 8, 8, 1, SPARSE_TIME),
        Preset("0.6b", 28, 1152, 36, 16, 2304, 32, 32, 1, SPARSE_TIME),
        Preset("1.6b", 20, 2240, 70, 20, 2304, 32, 32, 1, SPARSE_TIME),
        Preset("4.8b", 60, 2240, 70, 20, 2304, 32, 32, 1, SPARSE_TIME),
    )
}


def preset_of_width(width: int) -> Preset | None:
    """The first preset this wide: depth may differ, heads and time scale do not."""
    return next((row for row in PRESETS.values() if row.width == width), None)


def size_of(config: Mapping) -> str | None:
    """The preset of its depth and width."""
    sizes = {(row.depth, row.width): name for name, row in PRESETS.items()}
    return sizes.get((config["num_layers"], width_of(config)))


def size_name(config: Mapping) -> str:
    """Sana 0.6B, or the size it was pruned or grown from."""
    if exact := size_of(config):
        return f"Sana {exact.upper() if exact[0].isdigit() else exact}"
    preset = preset_of_width(width_of(config))
    return f"Sana of another depth than {preset.name}" if preset else "Sana of its own size"


def width_of(config: Mapping) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def heads_from(config: Mapping) -> str:
    return f"the preset of width {width_of(config)}"


def sizes(config: Mapping) -> Sizes:
    return Sizes(
        depth=config["num_layers"],
        width=width_of(config),
        channels=config["in_channels"],
        text_width=config["caption_channels"],
        side=config["sample_size"],
        patch=config["patch_size"],
    )


def is_student(config: Mapping) -> bool:
    return bool(config.get("guidance_embeds"))


def is_base(config: Mapping) -> bool:
    """Whether it is as the first public teachers: SANA-1.5 has QK-norm, and students embed guidance."""
    return config["qk_norm"] is None and not is_student(config)


def has_qk_norm(config: Mapping) -> bool:
    return config["qk_norm"] is not None


def adapted_config(config: Mapping) -> dict:
    return dict(config) | {"qk_norm": QK_NORM}


def student_config(config: Mapping) -> dict:
    return dict(config) | {"guidance_embeds": True}


def with_depth(config: Mapping, depth: int) -> dict:
    return dict(config) | {"num_layers": depth}


def transformer_config(name: str, qk_norm: bool = False, guidance_embeds: bool = False) -> dict:
    """Arguments of `SanaTransformer2DModel` for a preset: a base teacher, or (both flags) a student's."""
    if name not in PRESETS:
        raise SprintError(f"no size named {name!r}; choose one of {', '.join(PRESETS)}")
    row = PRESETS[name]
    return {
        "in_channels": row.in_channels,
        "out_channels": row.in_channels,
        "num_attention_heads": row.heads,
        "attention_head_dim": HEAD_DIM,
        "num_layers": row.depth,
        "num_cross_attention_heads": row.cross_heads,
        "cross_attention_head_dim": row.width // row.cross_heads,
        "cross_attention_dim": row.width,
        "caption_channels": row.caption_channels,
        "mlp_ratio": 2.5,
        "attention_bias": False,
        "sample_size": row.sample_size,
        "patch_size": row.patch_size,
        "qk_norm": QK_NORM if qk_norm else None,
        "guidance_embeds": guidance_embeds,
    }


# ---- from shapes ------------------------------------------------------------------------------------

NEEDED = dict(zip(KEYS.needed, (4, 2, 2, 4), strict=True))  # axes of what a config cannot do without


def config_of(shapes: Mapping[str, Shape], given: Mapping, heads: int | None) -> dict:
    """As `Teacher.config_from_shapes`."""
    config = config_from_shapes(
        shapes,
        cross_attention_heads=heads,
        attention_head_dim=given.get("attention_head_dim", HEAD_DIM),
        sample_size=given.get("sample_size"),
    )
    if not given.get("sample_size") and size_of(config) == SIZED and is_base(config):
        raise SprintError(
            f"a Sana {SIZED.upper()} teacher is for 512 px, 1K, 2K or 4K, and nothing here tells for which; "
            "give --sample-size 16, 32, 64 or 128, its latent cells a side"
        )
    return config


def config_from_shapes(
    shapes: Mapping[str, Shape],
    cross_attention_heads: int | None = None,
    attention_head_dim: int = HEAD_DIM,
    sample_size: int | None = None,
) -> dict:
    """The config that `shapes` (diffusers' names) describe. Sizes told twice go by majority, so that checking
    every shape against the result names the odd one out.

    `cross_attention_heads` and `sample_size` cannot be read from shapes: without a value they are those of
    the width's preset.  Raises SprintError where a needed tensor is missing, or nothing gives the heads.
    """
    for key, ndim in NEEDED.items():
        if key not in shapes:
            raise SprintError(f"missing key {key}")
        if len(shapes[key]) != ndim:
            raise SprintError(f"{key} has shape {list(shapes[key])}, expected {ndim} axes")
    width = _width(shapes)
    preset = preset_of_width(width)
    patch_size = shapes["patch_embed.proj.weight"][2]
    in_channels = _in_channels(shapes, patch_size)
    cross_heads = _cross_heads(width, cross_attention_heads, preset)
    if attention_head_dim < 1 or width % attention_head_dim:
        raise SprintError(
            f"width {width} is not a multiple of the self-attention head size {attention_head_dim}"
        )
    return {
        "in_channels": in_channels,
        "out_channels": in_channels,
        "num_attention_heads": width // attention_head_dim,
        "attention_head_dim": attention_head_dim,
        "num_layers": _depth(shapes),
        "num_cross_attention_heads": cross_heads,
        "cross_attention_head_dim": width // cross_heads,
        "cross_attention_dim": width,
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
        "mlp_ratio": _mlp_ratio(shapes, width),
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in shapes,
        "sample_size": sample_size or (preset.sample_size if preset else 32),
        "patch_size": patch_size,
        "qk_norm": QK_NORM if any(".norm_q." in key for key in shapes) else None,
        "guidance_embeds": any(".guidance_embedder." in key for key in shapes),
    }


def _width(shapes: Mapping[str, Shape]) -> int:
    return mode(
        [
            shapes["patch_embed.proj.weight"][0],
            shapes["proj_out.weight"][1],
            shapes["caption_projection.linear_1.weight"][0],
            shapes["transformer_blocks.0.ff.conv_inverted.weight"][1],
        ]
    )


def _in_channels(shapes: Mapping[str, Shape], patch_size: int) -> int:
    """A velocity has the channels of its latent, so the output tells as much as the input."""
    area = max(1, patch_size**2)
    told = [shapes["patch_embed.proj.weight"][1], shapes["proj_out.weight"][0] // area]
    told += [shape[0] // area for shape in [shapes.get("proj_out.bias")] if shape]
    return mode(told)


def _depth(shapes: Mapping[str, Shape]) -> int:
    """One more than the highest block, but never more blocks than tensors."""
    return min(len(shapes), 1 + max(int(match[1]) for match in map(BLOCK_NUMBER.match, shapes) if match))


def _mlp_ratio(shapes: Mapping[str, Shape], width: int) -> float:
    """GLUMBConv's inner width is int(ratio · width); its first convolution is twice as wide (value, gate)."""
    block = "transformer_blocks.0.ff."
    told = [shapes[block + "conv_inverted.weight"][0] // 2]
    told += [shape[0] // 2 for shape in [shapes.get(block + "conv_inverted.bias")] if shape]
    told += [shape[1] for shape in [shapes.get(block + "conv_point.weight")] if shape and len(shape) > 1]
    inner = mode(told)
    ratio = inner / width
    return ratio if int(ratio * width) == inner else (inner + 0.5) / width


def _cross_heads(width: int, given: int | None, preset: Preset | None) -> int:
    if given is None and preset is None:
        raise SprintError(
            f"width {width} is no known size, so the number of cross-attention heads is unknown; "
            "give --cross-attention-heads"
        )
    heads = given if given is not None else preset.cross_heads
    if heads < 1 or width % heads:
        raise SprintError(f"--cross-attention-heads {heads} does not divide the width {width}")
    return heads


# ---- the clock --------------------------------------------------------------------------------------


def time_clues(config: Mapping, pipeline: str) -> tuple[list[tuple[str, float | None]], str]:
    """As `Teacher.time_clues`: the pipeline, the guidance embedder, or the preset of a base teacher."""
    width = width_of(config)
    preset = preset_of_width(width)
    base = preset is not None and not config["qk_norm"]
    by_pipeline = {
        "SanaPipeline": SPARSE_TIME * config.get("timestep_scale", 1.0),
        "SanaSprintPipeline": DENSE_TIME,
    }
    clues = [
        ("model_index.json", by_pipeline.get(pipeline)),
        ("the guidance embedder, which students have", DENSE_TIME if config["guidance_embeds"] else None),
        (f"the preset of width {width}", preset.time_scale if base else None),
    ]
    return clues, "QK-norm without guidance may have either" if preset else f"width {width} is no known size"


# ---- on the meta device -----------------------------------------------------------------------------


def meta_network(config: Mapping) -> SanaTransformer2DModel:
    """The real class with no memory behind it."""
    with torch.device("meta"):
        return SanaTransformer2DModel(**config)


def network_shapes(config: dict) -> dict[str, Shape]:
    """Every key of the network's state dict and its shape, in the order of the class."""
    return {key: tuple(tensor.shape) for key, tensor in meta_network(config).state_dict().items()}


def count_parameters(config: dict) -> int:
    """Parameters of the network; a student's logvar head is counted by `count_logvar_parameters`."""
    return sum(p.numel() for p in meta_network(config).parameters())


def count_logvar_parameters(config: dict) -> int:
    """Linear(width, 1) beside the student: trained with it, not part of diffusers' class."""
    return width_of(config) + 1
