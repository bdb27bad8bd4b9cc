"""What a field of a network's config may be, so that no file makes a module of nonsense, or of gigabytes."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AllowInfNan, Field, Strict
from typing_extensions import TypedDict  # pydantic asks for this one on Python 3.11

from sprint.base.door import held_against
from sprint.base.errors import SprintError
from sprint.models.sana.presets import QK_NORM, width_of

TABLE_VALUES = 40 * 2**20  # of the position table, which is held in memory: 4K Sana 1.6B has 35 · 2^20


def _whole(most: int, least: int = 1) -> object:
    return Annotated[int, Strict(), Field(ge=least, le=most)]


Number = Annotated[float, Strict(), AllowInfNan(False)]
Switch = Annotated[bool, Strict()]


class SanaConfig(TypedDict, total=False):
    in_channels: _whole(4096)
    out_channels: _whole(4096) | None
    num_attention_heads: _whole(4096)
    attention_head_dim: _whole(4096)
    num_layers: _whole(512)
    num_cross_attention_heads: _whole(4096) | None
    cross_attention_head_dim: _whole(65536) | None
    cross_attention_dim: _whole(65536) | None
    caption_channels: _whole(65536)
    mlp_ratio: Annotated[Number, Field(gt=0, le=64)]
    dropout: Annotated[Number, Field(ge=0, lt=1)]
    attention_bias: Switch
    sample_size: _whole(512)
    patch_size: _whole(64)
    norm_elementwise_affine: Switch
    norm_eps: Annotated[Number, Field(ge=0, lt=1)]
    interpolation_scale: Annotated[Number, Field(ge=1 / 64, le=64)] | None
    guidance_embeds: Switch
    guidance_embeds_scale: Annotated[Number, Field(ge=-10000.0, le=10000.0)]
    qk_norm: Literal[QK_NORM] | None
    timestep_scale: Annotated[Number, Field(gt=0, le=10000.0)]


def check_config(config: Mapping, where: object) -> dict:
    """As `Teacher.check_config`."""
    fields = dict(held_against(SanaConfig, dict(config), where))
    if fields.get("interpolation_scale") is not None and {"sample_size", "patch_size"} <= fields.keys():
        _check_positions(fields, where)
    return fields


def _check_positions(config: Mapping, where: object) -> None:
    """Half of a position's channels are the column's and half the row's, and half of each are sines."""
    width, side = width_of(config), config["sample_size"] // config["patch_size"]
    if width % 4:
        raise SprintError(f"{where}: positions (interpolation_scale) need a width in fours; it is {width}")
    if not 1 <= side * side <= TABLE_VALUES // width:
        raise SprintError(
            f"{where}: sample_size {config['sample_size']} makes a table of {side}×{side} positions, {width} wide: "
            "no such network fits"
        )
