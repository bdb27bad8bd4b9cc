"""A source understood: which network it holds, what its clock is, and where every tensor goes."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor

from sprint.base.errors import SprintError
from sprint.models.sana.presets import CONFIG_KEYS, config_from_shapes, network_shapes, preset_of_width
from sprint.models.view import DENSE_TIME, SPARSE_TIME
from sprint.weights.keys import (
    EXTRAS,
    Layout,
    Rule,
    as_diffusers_shapes,
    check_shapes,
    expected_shapes,
    extra_shapes,
    find_layout,
    original_name,
    rules_for,
)
from sprint.weights.sources import Reader, Source, open_source
from sprint.weights.writer import Spec

TIMES = {"sparse": SPARSE_TIME, "dense": DENSE_TIME}
SCALES = {text: scale for scale in TIMES.values() for text in (f"{scale:g}", f"{scale:.1f}")}
STUDENTS = {"SanaSprintPipeline": DENSE_TIME}
CONFIG_FIELDS = tuple(inspect.signature(SanaTransformer2DModel.__init__).parameters)[1:]
POSITION_GRID = 64  # latent cells a side from which on original Sana adds position embeddings


@dataclass(frozen=True)
class Checkpoint:
    """What `understand` found out. Tensors are read on demand, in the order of `rules`."""

    source: Source
    layout: Layout
    config: dict  # arguments of SanaTransformer2DModel
    network: dict[str, tuple[int, ...]]  # shapes under diffusers' names
    rules: tuple[Rule, ...]
    time_scale: float
    time_scale_from: str
    cross_heads_from: str

    @cached_property
    def width(self) -> int:
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @property
    def time(self) -> str:
        return next(name for name, scale in TIMES.items() if scale == self.time_scale)

    @property
    def extras(self) -> list[str]:
        return [key for key in EXTRAS if key in self.source.entries]

    @property
    def metadata(self) -> dict[str, str]:
        """What shapes cannot tell, for the header of a file written from this."""
        heads = self.config["num_cross_attention_heads"]
        return {"format": "pt", "time_scale": f"{self.time_scale:g}", "num_cross_attention_heads": str(heads)}

    def dtype_of(self, rule: Rule) -> torch.dtype:
        return self.source.entries[rule.names(self.layout)[0]].dtype

    def specs(self, layout: Layout, dtype: torch.dtype | None = None) -> dict[str, Spec]:
        """Name -> (dtype, shape) of the network in `layout`, in the order of `stream`."""
        shapes = expected_shapes(list(self.rules), self.network, layout)
        return {
            n: (dtype or self.dtype_of(rule), shapes[n]) for rule in self.rules for n in rule.names(layout)
        }

    def stream(self, layout: Layout, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The network's tensors in `layout`, one after the other, rounded to `dtype` if one is given."""
        reader = Reader(self.source)
        for rule in self.rules:
            tensors = tuple(reader[name] for name in rule.names(self.layout))
            for name, tensor in zip(rule.names(layout), rule.map(tensors, self.layout, layout), strict=True):
                yield name, tensor if dtype is None else round_to(dtype, tensor, name)

    def extra_specs(self) -> dict[str, Spec]:
        return {key: (self.source.entries[key].dtype, self.source.entries[key].shape) for key in self.extras}

    def stream_extras(self) -> Iterator[tuple[str, Tensor]]:
        reader = Reader(self.source)
        for key in self.extras:
            yield key, reader[key]


def round_to(dtype: torch.dtype, tensor: Tensor, name: str) -> Tensor:
    """The nearest values of `dtype`; a finite weight that it cannot hold is an error."""
    rounded = tensor.to(dtype)
    if dtype == torch.float16 and rounded.isinf().sum() > tensor.isinf().sum():
        raise SprintError(f"{name} holds values beyond float16; use --dtype bf16 or fp32")
    return rounded


# ---- understanding ----------------------------------------------------------------------------------


def understand(
    name: str | Path, time_scale: float | None = None, cross_attention_heads: int | None = None
) -> Checkpoint:
    """Open a source and check every key and shape of it.

    `time_scale` (1000 or 1) and `cross_attention_heads` are what an option says; without one, and where no
    file and no known width tells, SprintError names the option. It also names unknown, missing, leftover and
    wrongly shaped keys, and what is no Sana.
    """
    source = open_source(name)
    layout = find_layout(source.entries)
    if layout is None:
        raise SprintError(f"{name} is not a Sana transformer: its keys are like {next(iter(source.entries))}")
    heads, heads_from = _cross_heads(source, cross_attention_heads)
    config = _config(source, layout, heads)
    network = network_shapes(config)
    rules = rules_for(network)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    extras = extra_shapes(width, config["caption_channels"])
    check_shapes(source.shapes, expected_shapes(rules, network, layout), extras, str(name))
    _check_dtypes(source, rules, layout)
    rules.sort(key=lambda rule: -source.entries[rule.names(layout)[0]].dtype.itemsize)
    scale, scale_from = _time_scale(source, config, width, time_scale)
    heads_from = heads_from or f"the preset of width {width}"
    return Checkpoint(source, layout, config, network, tuple(rules), scale, scale_from, heads_from)


def _config(source: Source, layout: Layout, heads: int | None) -> dict:
    """From the shapes; a config.json adds what they cannot tell, and must agree in what they can."""
    shapes = source.shapes if layout == "diffusers" else as_diffusers_shapes(source.shapes)
    for key in CONFIG_KEYS:
        if key not in shapes:
            raise SprintError(
                f"{source.name}: missing key {key if layout == 'diffusers' else original_name(key)}"
            )
    given = {key: value for key, value in source.config.items() if key in CONFIG_FIELDS}
    try:
        config = config_from_shapes(
            shapes,
            cross_attention_heads=heads,
            sample_size=given.get("sample_size") or _sample_size(source),
            **{key: given[key] for key in ("attention_head_dim",) if key in given},
        )
    except SprintError as error:
        raise SprintError(f"{source.name}: {error}") from error
    for key, value in given.items():
        if key in config and value != config[key] and not (key == "out_channels" and value is None):
            raise SprintError(f"{source.name}: config.json says {key} {value}, the weights {config[key]}")
    return given | config


def _sample_size(source: Source) -> int | None:
    """Latent cells a side, which an original file tells by its position buffer."""
    shape = source.shapes.get("pos_embed", ())
    patch = source.shapes.get("x_embedder.proj.weight", ())
    if len(shape) != 3 or len(patch) != 4:
        return None
    size = round(shape[1] ** 0.5) * patch[2]
    if size >= POSITION_GRID and not source.config:
        raise SprintError(
            f"{source.name}: pos_embed has {shape[1]} places; 2K and 4K Sana add position embeddings, "
            "which an original file does not describe; give its diffusers folder"
        )
    return size


def _cross_heads(source: Source, option: int | None) -> tuple[int | None, str]:
    told = {
        "--cross-attention-heads": option,
        "config.json": source.config.get("num_cross_attention_heads"),
        "the file's metadata": source.metadata.get("num_cross_attention_heads"),
    }
    told = {origin: value for origin, value in told.items() if value is not None}
    if not all(str(value).isdecimal() for value in told.values()):
        raise SprintError(f"{source.name}: number of cross-attention heads is not a number: {told}")
    if len({int(value) for value in told.values()}) > 1:
        numbers = ", ".join(f"{value} in {origin}" for origin, value in told.items())
        raise SprintError(f"{source.name}: different numbers of cross-attention heads: {numbers}")
    return next(((int(value), origin) for origin, value in told.items()), (None, ""))


def _time_scale(source: Source, config: dict, width: int, option: float | None) -> tuple[float, str]:
    """-> time scale and what told it, the nearest word first."""
    preset = preset_of_width(width)
    base = preset is not None and not config["qk_norm"]
    pipeline_scale = SPARSE_TIME * config.get("timestep_scale", 1.0)
    told = [
        ("--time-scale", option),
        ("trigflow.json", source.trigflow.get("time_scale")),
        ("the file's metadata", source.metadata.get("time_scale")),
        ("model_index.json", {"SanaPipeline": pipeline_scale, **STUDENTS}.get(source.pipeline)),
        ("the guidance embedder, which students have", DENSE_TIME if config["guidance_embeds"] else None),
        (f"the preset of width {width}", preset.time_scale if base else None),
    ]
    told = [(origin, value) for origin, value in told if value is not None]
    if not told:
        why = "QK-norm without guidance may have either" if preset else f"width {width} is no known size"
        raise SprintError(f"{source.name}: sparse or dense time? ({why}); give --time-scale sparse or dense")
    origin, value = told[0]
    if str(value) not in SCALES:
        raise SprintError(
            f"{source.name}: {origin} gives time scale {value}; it is 1000 (sparse) or 1 (dense)"
        )
    return SCALES[str(value)], origin


def _check_dtypes(source: Source, rules: list[Rule], layout: Layout) -> None:
    """Parts of one original tensor must share a dtype, or there is no way back."""
    for rule in rules:
        names = rule.names(layout)
        if len({source.entries[name].dtype for name in names}) > 1:
            raise SprintError(f"{source.name}: {' and '.join(names)} have different dtypes")
