"""Names of tensors: a family's original layout and diffusers'. One table, written in one direction.

A row is a module's original name and its name in diffusers; several names are equal parts of the original
along dim 0. Rows whose diffusers names a network lacks (QK-norm, guidance, one of the two time embedders)
do not apply to it, so no flag chooses between rows and the inverse is the same table read backwards.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sprint.base.errors import SprintError
from sprint.models.teacher import KeyTable, Shape, Sizes, Stack

Layout = Literal["original", "diffusers"]

PARAMETERS = (".weight", ".bias", "")  # "" is a parameter that is no module's
LOGVAR_KEYS = ("logvar_linear.weight", "logvar_linear.bias")  # a student's head, by Sana-Sprint's own names


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


def _rules(table: KeyTable, keys: Collection[str], layout: Layout) -> Iterator[Rule]:
    """The whole table as deep as `keys` of this layout are, every row with every parameter a module could have."""
    rows = [(original, names) for original, *names in table.rows]
    for stack in table.stacks:
        for i in range(_depth(stack, keys, layout)):
            rows += [
                (f"{stack.original}.{i}.{original}", [f"{stack.diffusers}.{i}.{name}" for name in names])
                for original, *names in stack.rows
            ]
    for original, names in rows:
        for parameter in PARAMETERS:
            yield Rule(original + parameter, tuple(name + parameter for name in names))


def _depth(stack: Stack, keys: Collection[str], layout: Layout) -> int:
    """One more than the highest block, but never more blocks than keys: an absurd index is an unknown key."""
    prefix = stack.original if layout == "original" else stack.diffusers
    block = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    highest = max((int(match[1]) for match in map(block.match, keys) if match), default=-1)
    return min(highest + 1, len(keys))


def rules_for(table: KeyTable, network: Iterable[str]) -> list[Rule]:
    """The rows that apply to a network with these (diffusers) keys; every key is in exactly one."""
    network = set(network)
    rules = [rule for rule in _rules(table, network, "diffusers") if network.issuperset(rule.diffusers)]
    covered = [name for rule in rules for name in rule.diffusers]
    if set(covered) != network or len(covered) != len(network):
        raise SprintError(f"no row of the key table for {min(network - set(covered))}")
    return rules


def table_names(table: KeyTable) -> set[str]:
    """Every name that the table knows in either layout, of its stacks those of block 0."""
    first = [f"{stack.original}.0." for stack in table.stacks]
    return {name for rule in _rules(table, first, "original") for name in (rule.original, *rule.diffusers)}


def known_keys(table: KeyTable, keys: Iterable[str]) -> dict[Layout, int]:
    """How many of these keys each layout has a row for."""
    keys = set(keys)
    return {
        layout: len(keys & {name for rule in _rules(table, keys, layout) for name in rule.names(layout)})
        for layout in ("original", "diffusers")
    }


def find_layout(table: KeyTable, keys: Iterable[str]) -> Layout | None:
    """The layout that knows most of these keys, if it knows at least half; None is of another family."""
    keys = set(keys)
    known = known_keys(table, keys)
    layout = max(known, key=known.get)
    return layout if keys and 2 * known[layout] >= len(keys) else None


def as_diffusers_shapes(table: KeyTable, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Original shapes under diffusers' names, unchecked; where a row has two readings, both."""
    renamed = {}
    for rule in _rules(table, shapes, "original"):
        if rule.original in shapes:
            first, *rest = shapes[rule.original] or (0,)
            renamed |= dict.fromkeys(rule.diffusers, (first // len(rule.diffusers), *rest))
    return renamed


def original_name(table: KeyTable, diffusers: str) -> str:
    """The original of a key, in whatever network; for messages."""
    depth = 1 + max(map(int, re.findall(r"\.(\d+)\.", diffusers)), default=0)
    rules = _rules(table, [diffusers] * depth, "diffusers")
    return next((rule.original for rule in rules if diffusers in rule.diffusers), diffusers)


def expected_shapes(rules: list[Rule], network: Mapping[str, Shape], layout: Layout) -> dict[str, Shape]:
    """What a checkpoint in `layout` must hold for a network of these (diffusers) shapes."""
    if layout == "diffusers":
        return {name: network[name] for rule in rules for name in rule.diffusers}
    return {
        rule.original: (sum(network[name][0] for name in rule.diffusers), *network[rule.diffusers[0]][1:])
        for rule in rules
    }


def extra_shapes(table: KeyTable, sizes: Sizes) -> dict[str, tuple[int | None, ...]]:
    """Shapes of what diffusers' class has no place for, a student's logvar head too; None is any length."""
    shapes = {
        key: tuple(getattr(sizes, size) if isinstance(size, str) else size for size in shape)
        for key, shape in table.extras.items()
    }
    return shapes | dict(zip(LOGVAR_KEYS, ((1, sizes.width), (1,)), strict=True))


def check_shapes(
    found: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    extras: Mapping[str, tuple[int | None, ...]],
    where: str,
) -> None:
    """Every expected key is there with its shape, and nothing else but `extras`. Raises SprintError."""
    missing = [key for key in expected if key not in found]
    unknown = [key for key in found if key not in expected and key not in extras]
    wrong = [
        f"{kind} key {keys[0]}" + f" (and {len(keys) - 1} more)" * (len(keys) > 1)
        for kind, keys in (("missing", missing), ("unknown", unknown))
        if keys
    ]
    if wrong:
        raise SprintError(f"{where}: {', '.join(wrong)}")
    for key, shape in found.items():
        wanted = expected[key] if key in expected else extras[key]
        if len(shape) != len(wanted) or any(w not in (None, s) for s, w in zip(shape, wanted, strict=True)):
            text = ", ".join("any" if size is None else str(size) for size in wanted)
            raise SprintError(f"{where}: {key} has shape {list(shape)}, expected [{text}]")
