"""Weights read once from the disk, tensor by tensor: are they finite, and how far have they moved?

Tensors go by the original layout's names, in which a teacher's and its student's agree.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sprint.engine.checkpoint import read_tensors, stored_tensors
from sprint.models.teacher import KeyTable
from sprint.weights.checkpoint import Checkpoint
from sprint.weights.keys import Rule, rules_for
from sprint.weights.sources import Reader
from sprint.weights.verify import as_bits

Weights = Mapping[str, Callable[[], Tensor]]  # by original name; each call reads from the disk
LOW_HALF = 0xFFFF  # of a float32: what bfloat16 lacks
LARGEST_HALF = torch.finfo(torch.float16).max


def weights_of(checkpoint: Checkpoint) -> Weights:
    """Of a model on disk."""
    reader, layout = Reader(checkpoint.source), checkpoint.layout

    def read(rule: Rule) -> Tensor:
        (tensor,) = rule.map(tuple(reader[name] for name in rule.names(layout)), layout, "original")
        return tensor

    return {rule.original: lambda rule=rule: read(rule) for rule in checkpoint.rules}


def weights_in(checkpoint: Path, keys: KeyTable, prefix: str) -> Weights:
    """The network's in a run's own checkpoint, read at once; none where no key begins with `prefix`.

    Raises SprintError where the checkpoint cannot be read.
    """
    there = {
        key.removeprefix(prefix): facts
        for key, facts in stored_tensors(checkpoint).items()
        if key.startswith(prefix)
    }
    if not there:
        return {}
    stored = {
        prefix + name: torch.empty(facts.size, dtype=facts.properties.dtype) for name, facts in there.items()
    }
    read_tensors(checkpoint, stored)

    def joined(rule: Rule) -> Tensor:
        (tensor,) = rule.join(tuple(stored[prefix + name] for name in rule.diffusers))
        return tensor

    return {rule.original: lambda rule=rule: joined(rule) for rule in rules_for(keys, there)}


# ---- one set ----------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What one pass over weights counts."""

    tensors: int = 0
    numbers: int = 0
    dtypes: Counter = field(default_factory=Counter)  # numbers by dtype
    broken: dict[str, int] = field(default_factory=dict)  # how many are not finite, by name
    largest: float = 0.0  # of those that are finite
    rounded: bool = True  # every float32 is a bfloat16 number


def tally(weights: Weights) -> Tally:
    counted = Tally()
    for name, read in weights.items():
        tensor = read()
        counted.tensors += 1
        counted.numbers += tensor.numel()
        counted.dtypes[tensor.dtype] += tensor.numel()
        finite = tensor.isfinite()
        if bad := int((~finite).sum()):
            counted.broken[name] = bad
            tensor = tensor[finite]
        if tensor.numel():
            counted.largest = max(counted.largest, tensor.abs().max().item())
        if tensor.dtype is not torch.float32 or (as_bits(tensor) & LOW_HALF).any():
            counted.rounded = False
    return counted


# ---- two sets ---------------------------------------------------------------------------------------


@dataclass
class Part:
    """Tensors of one kind, over all blocks. Squares are sums over their numbers."""

    tensors: int = 0
    numbers: int = 0
    same_tensors: int = 0  # bit for bit
    same_numbers: int = 0
    moved_square: float = 0.0
    square: float = 0.0  # of the other one's

    @property
    def distance(self) -> float:
        """‖a − b‖ / ‖b‖; infinite where only b is zero"""
        if not self.square:
            return math.inf if self.moved_square else 0.0
        return math.sqrt(self.moved_square / self.square)

    def __add__(self, other: "Part") -> "Part":
        return Part(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class Comparison:
    """Of `here` with `there`: those that both have, by part, and the names of the rest."""

    parts: dict[str, Part]
    only_here: list[str]
    only_there: list[str]
    other_shape: list[str]
    rounded_to: torch.dtype | None  # both, where their dtypes differ

    @property
    def whole(self) -> Part:
        return sum(self.parts.values(), Part())


def compare(here: Weights, there: Weights, keys: KeyTable) -> Comparison:
    """Distances in float32; bits after rounding to the coarser of two dtypes."""
    result = Comparison({}, sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys()), [], None)
    for name in (name for name in here if name in there):
        a, b = here[name](), there[name]()
        if a.shape != b.shape:
            result.other_shape.append(name)
            continue
        if a.dtype != b.dtype:
            coarser = min(a.dtype, b.dtype, key=lambda dtype: -torch.finfo(dtype).eps)
            a, b = a.to(coarser), b.to(coarser)
            result.rounded_to = coarser
        part = result.parts.setdefault(part_of(name, keys), Part())
        same = as_bits(a.contiguous()) == as_bits(b.contiguous())
        part.tensors += 1
        part.numbers += a.numel()
        part.same_numbers += int(same.sum())
        part.same_tensors += bool(same.all())
        part.moved_square += _square(a.float() - b.float())
        part.square += _square(b.float())
    return result


def part_of(name: str, keys: KeyTable) -> str:
    """ "attn" of "blocks.3.attn.qkv.weight", "norms" of every norm, else the name's beginning: "t_embedder"."""
    for stack in keys.stacks:
        if name.startswith(f"{stack.original}."):
            name = name.split(".", 2)[2]
    return "norms" if "norm" in name else name.split(".")[0]


def _square(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2


def names_of(names: Iterable[str], most: int = 3) -> str:
    """ "a, b, c and 4 more" """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
