"""Names of tensors: Sana's original layout and diffusers'. One table, written in one direction.

A row is a module's original name and its name in diffusers; several names are equal parts of the original
along dim 0. Rows whose diffusers names a network lacks (QK-norm, guidance, one of the two time embedders)
do not apply to it, so no flag chooses between rows and the inverse is the same table read backwards.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sprint.base.errors import SprintError
from sprint.weights.sources import Shape

Layout = Literal["original", "diffusers"]

NETWORK = (
    # original                        diffusers
    ("x_embedder.proj", "patch_embed.proj"),
    ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    ("attention_y_norm", "caption_norm"),
    ("t_embedder.mlp.0", "time_embed.emb.timestep_embedder.linear_1"),  # a teacher
    ("t_embedder.mlp.2", "time_embed.emb.timestep_embedder.linear_2"),
    ("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1"),  # a student, which embeds guidance too
    ("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2"),
    ("cfg_embedder.mlp.0", "time_embed.guidance_embedder.linear_1"),
    ("cfg_embedder.mlp.2", "time_embed.guidance_embedder.linear_2"),
    ("t_block.1", "time_embed.linear"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.scale_shift_table", "scale_shift_table"),
)
BLOCK = (
    # blocks.i. …                     transformer_blocks.i. …
    ("scale_shift_table", "scale_shift_table"),
    ("attn.qkv", "attn1.to_q", "attn1.to_k", "attn1.to_v"),
    ("attn.q_norm", "attn1.norm_q"),
    ("attn.k_norm", "attn1.norm_k"),
    ("attn.proj", "attn1.to_out.0"),
    ("cross_attn.q_linear", "attn2.to_q"),
    ("cross_attn.kv_linear", "attn2.to_k", "attn2.to_v"),
    ("cross_attn.q_norm", "attn2.norm_q"),
    ("cross_attn.k_norm", "attn2.norm_k"),
    ("cross_attn.proj", "attn2.to_out.0"),
    ("mlp.inverted_conv.conv", "ff.conv_inverted"),
    ("mlp.depth_conv.conv", "ff.conv_depth"),
    ("mlp.point_conv.conv", "ff.conv_point"),
)
PARAMETERS = (".weight", ".bias", "")  # "" is a parameter that is no module's

# Tensors of the original that diffusers' class has no place for.
EXTRAS = ("y_embedder.y_embedding", "pos_embed", "logvar_linear.weight", "logvar_linear.bias")


@dataclass(frozen=True)
class Rule:
    """One tensor of the original, and the tensors that are its equal parts along dim 0 in diffusers."""

    original: str
    diffusers: tuple[str, ...]

    def names(self, layout: Layout) -> tuple[str, ...]:
        return (self.original,) if layout == "original" else self.diffusers

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """original -> diffusers"""
        return tensor.chunk(len(self.diffusers)) if len(self.diffusers) > 1 else (tensor,)

    def join(self, parts: tuple[Tensor, ...]) -> tuple[Tensor]:
        """diffusers -> original; parts of two dtypes cannot be one tensor"""
        if len({part.dtype for part in parts}) > 1:
            raise SprintError(
                f"{' and '.join(self.diffusers)} have different dtypes, so {self.original} has none"
            )
        return (torch.cat(parts),) if len(parts) > 1 else parts

    def map(self, tensors: tuple[Tensor, ...], source: Layout, target: Layout) -> tuple[Tensor, ...]:
        """The tensors called `names(source)` become the ones called `names(target)`."""
        if source == target:
            return tensors
        return self.split(*tensors) if source == "original" else self.join(tensors)


def _rows(depth: int) -> Iterable[Rule]:
    """The whole table, every row with every parameter a module could have."""
    rows = [(original, names) for original, *names in NETWORK]
    for i in range(depth):
        rows += [(f"blocks.{i}.{o}", [f"transformer_blocks.{i}.{n}" for n in names]) for o, *names in BLOCK]
    for original, names in rows:
        for parameter in PARAMETERS:
            yield Rule(original + parameter, tuple(name + parameter for name in names))


def rules_for(network: Iterable[str]) -> list[Rule]:
    """The rows that apply to a network with these (diffusers) keys; every key is in exactly one."""
    network = set(network)
    rules = [rule for rule in _rows(_depth(network, "diffusers")) if network.issuperset(rule.diffusers)]
    covered = [name for rule in rules for name in rule.diffusers]
    if set(covered) != network or len(covered) != len(network):
        raise SprintError(f"no row of the key table for {min(network - set(covered))}")
    return rules


def find_layout(keys: Iterable[str]) -> Layout | None:
    """The layout that knows most of these keys, if it knows at least half; None is no Sana."""
    keys = set(keys)
    known = {}
    for layout in ("original", "diffusers"):
        names = {name for rule in _rows(_depth(keys, layout)) for name in rule.names(layout)}
        known[layout] = len(keys & names)
    layout = max(known, key=known.get)
    return layout if keys and 2 * known[layout] >= len(keys) else None


def _depth(keys: Collection[str], layout: Layout) -> int:
    """One more than the highest block, but never more blocks than keys: an absurd index is an unknown key."""
    block = re.compile(r"blocks\.(\d+)\." if layout == "original" else r"transformer_blocks\.(\d+)\.")
    highest = max((int(match[1]) for match in map(block.match, keys) if match), default=-1)
    return min(highest + 1, len(keys))


def as_diffusers_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Original shapes under diffusers' names, unchecked; where a row has two readings, both."""
    renamed = {}
    for rule in _rows(_depth(shapes, "original")):
        if rule.original in shapes:
            first, *rest = shapes[rule.original] or (0,)
            renamed |= dict.fromkeys(rule.diffusers, (first // len(rule.diffusers), *rest))
    return renamed


def original_name(diffusers: str) -> str:
    """The original of a key, in whatever network; for messages."""
    block = re.match(r"transformer_blocks\.(\d+)\.", diffusers)
    depth = int(block[1]) + 1 if block else 0
    return next((rule.original for rule in _rows(depth) if diffusers in rule.diffusers), diffusers)


def expected_shapes(rules: list[Rule], network: Mapping[str, Shape], layout: Layout) -> dict[str, Shape]:
    """What a checkpoint in `layout` must hold for a network of these (diffusers) shapes."""
    if layout == "diffusers":
        return {name: network[name] for rule in rules for name in rule.diffusers}
    return {
        rule.original: (sum(network[name][0] for name in rule.diffusers), *network[rule.diffusers[0]][1:])
        for rule in rules
    }


def extra_shapes(width: int, caption_channels: int) -> dict[str, tuple[int | None, ...]]:
    """Shapes of EXTRAS; None is any length."""
    shapes = ((None, caption_channels), (1, None, width), (1, width), (1,))
    return dict(zip(EXTRAS, shapes, strict=True))


def check_shapes(
    found: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    extras: Mapping[str, tuple[int | None, ...]],
    where: str,
) -> None:
    """Every expected key is there with its shape, and nothing else but `extras`. Raises SprintError."""
    missing = [key for key in expected if key not in found]
    unknown = [key for key in found if key not in expected and key not in extras]
    for kind, keys in (("missing", missing), ("unknown", unknown)):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise SprintError(f"{where}: {kind} key {keys[0]}{more}")
    for key, shape in found.items():
        wanted = expected[key] if key in expected else extras[key]
        if len(shape) != len(wanted) or any(w not in (None, s) for s, w in zip(shape, wanted, strict=True)):
            text = ", ".join("any" if size is None else str(size) for size in wanted)
            raise SprintError(f"{where}: {key} has shape {list(shape)}, expected [{text}]")
