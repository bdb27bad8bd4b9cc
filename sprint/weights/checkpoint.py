"""A source understood: which network it holds, what its clock is, and where every tensor goes."""

import inspect
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sprint.base.door import parse_json, shown
from sprint.base.errors import SprintError
from sprint.base.finite import finite_only
from sprint.models import families
from sprint.models.teacher import DENSE_TIME, SPARSE_TIME, Shape, Sizes, Teacher
from sprint.weights.keys import (
    Layout,
    Rule,
    as_diffusers_shapes,
    check_shapes,
    expected_shapes,
    extra_shapes,
    find_layout,
    known_keys,
    original_name,
    rules_for,
)
from sprint.weights.sources import Reader, Source, open_source
from sprint.weights.writer import Spec

TIMES = {"sparse": SPARSE_TIME, "dense": DENSE_TIME}
HEADS_DIGITS = 5
CONFIG_ENTRY = "config"  # of a file's metadata: the network's constructor arguments, as JSON
SCALES = {text: scale for scale in TIMES.values() for text in (f"{scale:g}", f"{scale:.1f}")}


@dataclass(frozen=True)
class Checkpoint:
    """What `understand` found out. Tensors are read on demand, in the order of `rules`."""

    source: Source
    family: Teacher
    layout: Layout
    config: dict  # every argument of the family's network
    network: dict[str, Shape]  # shapes under diffusers' names
    rules: tuple[Rule, ...]
    time_scale: float
    time_scale_from: str
    heads_from: str
    recomputed: tuple[str, ...] = ()  # of the source's tensors: the network computes them from its config

    @property
    def sizes(self) -> Sizes:
        return self.family.sizes(self.config)

    @property
    def parameters(self) -> int:
        """How many numbers the network has."""
        return sum(math.prod(shape) for shape in self.network.values())

    @property
    def is_student(self) -> bool:
        """Whether it embeds guidance."""
        return self.family.is_student(self.config)

    def check_role(self, student: bool) -> None:
        """Raise SprintError where a student is needed and this is a teacher, or the other way round."""
        families.check_role(self.source.name, self.family, self.config, student)

    @property
    def time(self) -> str:
        return next(name for name, scale in TIMES.items() if scale == self.time_scale)

    @property
    def extras(self) -> list[str]:
        known = extra_shapes(self.family.keys, self.sizes)
        return [key for key in known if key in self.source.entries and key not in self.recomputed]

    @property
    def metadata(self) -> dict[str, str]:
        """What shapes cannot tell, for the header of a file written from this."""
        heads = self.family.heads_field
        told = {"time_scale": f"{self.time_scale:g}", heads: str(self.config[heads])}
        return {"format": "pt", **told, CONFIG_ENTRY: json.dumps(self.config, sort_keys=True)}

    def dtype_of(self, rule: Rule) -> torch.dtype:
        return self.source.entries[rule.names(self.layout)[0]].dtype

    def specs(self, layout: Layout, dtype: torch.dtype | None = None) -> dict[str, Spec]:
        """Name -> (dtype, shape) of the network in `layout`, in the order of `stream`."""
        shapes = expected_shapes(list(self.rules), self.network, layout)
        return {
            n: (dtype or self.dtype_of(rule), shapes[n]) for rule in self.rules for n in rule.names(layout)
        }

    def stream(
        self, layout: Layout, dtype: torch.dtype | None = None, only: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The network's tensors in `layout`, one after the other, rounded to `dtype` if one is given.

        only   names in `layout`; other tensors are not read
        Raises SprintError at the end where some of them were not finite, by the source's own names.
        """
        rules = [
            rule for rule in self.rules if only is None or any(name in only for name in rule.names(layout))
        ]
        reader = Reader(self.source)
        names = (name for rule in rules for name in rule.names(self.layout))
        read = finite_only(((name, reader[name]) for name in names), self.source.name)
        for rule in rules:
            tensors = tuple(next(read)[1] for _ in rule.names(self.layout))
            for name, tensor in zip(rule.names(layout), rule.map(tensors, self.layout, layout), strict=True):
                if only is None or name in only:
                    yield name, tensor if dtype is None else round_to(dtype, tensor, name)
        next(read, None)  # which tells what was not finite

    def extra_specs(self) -> dict[str, Spec]:
        return {key: (self.source.entries[key].dtype, self.source.entries[key].shape) for key in self.extras}

    def stream_extras(self) -> Iterator[tuple[str, Tensor]]:
        reader = Reader(self.source)
        yield from finite_only(((key, reader[key]) for key in self.extras), self.source.name)


def round_to(dtype: torch.dtype, tensor: Tensor, name: str) -> Tensor:
    """The nearest values of `dtype`; a finite weight that it cannot hold is an error."""
    rounded = tensor.to(dtype)
    if rounded.isinf().sum() > tensor.isinf().sum():
        kind = str(dtype).removeprefix("torch.")
        wider = "use --dtype bf16 or fp32" if dtype == torch.float16 else "leave --dtype out"
        raise SprintError(f"{name} holds values beyond {kind}; {wider}")
    return rounded


# ---- understanding ----------------------------------------------------------------------------------


def understand(
    name: str | Path,
    time_scale: float | None = None,
    cross_attention_heads: int | None = None,
    sample_size: int | None = None,
    weights: str | None = None,
    variant: str | None = None,
) -> Checkpoint:
    """Open a source and check every key and shape of it, and every setting before anything is built.

    `time_scale` (1000 or 1), `cross_attention_heads` and `sample_size` (latent cells a side) are what an option says;
    without one, and where no file and no known width tells, SprintError names the option. It also names unknown,
    missing, leftover and wrongly shaped keys, settings out of range, and what is of no family.
    `weights` and `variant` choose as in `open_source`.
    """
    source = open_source(name, weights, variant)
    family = _family(source)
    layout = find_layout(family.keys, source.entries)
    if layout is None:
        raise SprintError(
            f"{name} is not a {families.titles()} transformer: its keys are like {next(iter(source.entries))}"
        )
    told = _given(source, family, sample_size)
    heads, heads_from = _heads(source, family.heads_field, cross_attention_heads)
    try:
        by_extras, recomputed = family.told_by_extras(told, source.shapes, Reader(source).__getitem__)
    except SprintError as error:
        raise SprintError(f"{source.name}: {error}") from error
    config = _config(source, family, layout, heads, told | by_extras)
    network = {key: tuple(tensor.shape) for key, tensor in family.meta_network(config).state_dict().items()}
    rules = rules_for(family.keys, network)
    extras = extra_shapes(family.keys, family.sizes(config))
    check_shapes(source.shapes, expected_shapes(rules, network, layout), extras, str(name))
    _check_dtypes(source, rules, layout)
    rules.sort(key=lambda rule: -source.entries[rule.names(layout)[0]].dtype.itemsize)
    scale, scale_from = _time_scale(source, family, config, time_scale)
    heads_from = heads_from or family.heads_from(config)
    facts = tuple(rules), scale, scale_from, heads_from, recomputed
    return Checkpoint(source, family, layout, config, network, *facts)


def _family(source: Source) -> Teacher:
    """As its config.json says, or the one that knows most of its keys."""
    if named := families.family_of_class(source.config.get("_class_name", "")):
        return named
    return max(families.FAMILIES, key=lambda one: max(known_keys(one.keys, source.entries).values()))


def _given(source: Source, family: Teacher, sample_size: int | None) -> dict:
    """What option, config.json and the file's own metadata say of the network, each in its range.

    Raises SprintError where two of them contradict each other.
    """
    stored = source.metadata.get(CONFIG_ENTRY)
    inside = {} if stored is None else parse_json(stored, f"{source.name}: the file's metadata")
    if not isinstance(inside, dict):
        raise SprintError(f"{source.name}: {CONFIG_ENTRY} of the file's metadata is not a JSON object")
    sources = {"config.json": source.config, "the file's metadata": inside}
    given, origins = {}, {}
    for origin, config in sources.items():
        for key, value in family.check_config(config, f"{source.name}: {origin}").items():
            if key in given and given[key] != value:
                raise SprintError(
                    f"{source.name}: {key} is {shown(given[key])} in {origins[key]} and {shown(value)} in {origin}"
                )
            given[key], origins[key] = value, origin
    if sample_size is None:
        return given
    option = family.check_config(family.config_of_size(sample_size), f"--sample-size {sample_size}")
    for key, value in option.items():
        if key in given and given[key] != value:
            raise SprintError(
                f"{source.name}: --sample-size {sample_size} means {key} {value}, "
                f"but {origins[key]} says {shown(given[key])}"
            )
    return given | option


def _config(source: Source, family: Teacher, layout: Layout, heads: int | None, told: dict) -> dict:
    """Every argument: from the shapes, and as `told` what these cannot tell; where both tell they must agree."""
    keys = family.keys
    shapes = source.shapes if layout == "diffusers" else as_diffusers_shapes(keys, source.shapes)
    for key in keys.needed:
        if key not in shapes:
            missing = key if layout == "diffusers" else original_name(keys, key)
            raise SprintError(f"{source.name}: missing key {missing}")
    try:
        config = family.config_from_shapes(shapes, told, heads)
    except SprintError as error:
        raise SprintError(f"{source.name}: {error}") from error
    for key, value in told.items():
        if key in config and value != config[key] and not (key == "out_channels" and value is None):
            where = "config.json" if key in source.config else "its metadata"
            raise SprintError(f"{source.name}: {where} says {key} {shown(value)}, the weights {config[key]}")
    return family.check_config(_defaults(family) | told | config, source.name)


def _defaults(family: Teacher) -> dict:
    """What the network's constructor takes where nothing is said."""
    arguments = list(inspect.signature(family.network_class.__init__).parameters.values())[1:]
    return {one.name: one.default for one in arguments if one.default is not inspect.Parameter.empty}


def _heads(source: Source, key: str, option: int | None) -> tuple[int | None, str]:
    """The number of heads and what told it; (None, "") where nothing does."""
    told = {
        "--cross-attention-heads": option,
        "config.json": source.config.get(key),
        "the file's metadata": source.metadata.get(key),
    }
    told = {origin: value for origin, value in told.items() if value is not None}
    for origin, value in told.items():
        if not str(value).isdecimal() or len(str(value)) > HEADS_DIGITS:
            raise SprintError(
                f"{source.name}: number of cross-attention heads is not a number: {shown(value)} in {origin}"
            )
    if len({int(value) for value in told.values()}) > 1:
        numbers = ", ".join(f"{value} in {origin}" for origin, value in told.items())
        raise SprintError(f"{source.name}: different numbers of cross-attention heads: {numbers}")
    return next(((int(value), origin) for origin, value in told.items()), (None, ""))


def _time_scale(source: Source, family: Teacher, config: dict, option: float | None) -> tuple[float, str]:
    """-> time scale and what told it, the nearest word first."""
    pipeline = source.pipeline if isinstance(source.pipeline, str) else ""
    clues, why = family.time_clues(config, pipeline)
    told = [
        ("--time-scale", option),
        ("trigflow.json", source.trigflow.get("time_scale")),
        ("the file's metadata", source.metadata.get("time_scale")),
        *clues,
    ]
    told = [(origin, value) for origin, value in told if value is not None]
    if not told:
        raise SprintError(f"{source.name}: sparse or dense time? ({why}); give --time-scale sparse or dense")
    origin, value = told[0]
    if str(value) not in SCALES:
        raise SprintError(
            f"{source.name}: {origin} gives time scale {shown(value)}; it is 1000 (sparse) or 1 (dense)"
        )
    return SCALES[str(value)], origin


def _check_dtypes(source: Source, rules: list[Rule], layout: Layout) -> None:
    """Parts of one original tensor must share a dtype, or there is no way back."""
    for rule in rules:
        names = rule.names(layout)
        if len({source.entries[name].dtype for name in names}) > 1:
            raise SprintError(f"{source.name}: {' and '.join(names)} have different dtypes; save them in one")
