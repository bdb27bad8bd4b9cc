"""YAML that a person wrote, told from what only a reader of YAML would survive: small, shallow, written out."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from sprint.base.door import shown
from sprint.base.errors import SprintError

DEEPEST = 20  # lists and groups within each other
LONGEST = 10_000  # values once every *alias is written out

# What readers of YAML let through: `!!int x`, `!!int` of nothing, a number of 5,000 digits or one that no float holds.
NOT_A_VALUE = (ValueError, IndexError, OverflowError, RecursionError, TypeError, AttributeError)


class Place(NamedTuple):
    """Where a text is from, as errors name it, and the line of every dotted key; none for a line of its own."""

    name: str
    lines: dict[str, int]
    is_group: bool = True  # whether the text is of keys and their values, or empty

    def of(self, key: str) -> str:
        """The file, and the line of the key or of the nearest group that it stands in."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.name}, line {self.lines[key]}" if key else self.name


def look_over(text: str, where: str) -> Place:
    """Look at a text before any value is made of it.  -> its keys' lines

    Raises SprintError, with the line, for what is not YAML, holds what cannot be a value, or is nested or repeated
    beyond reason.
    """
    try:
        _check_depth(text, where)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _written_out(root, where, {})
            _check_scalars(root, where, yaml.SafeLoader(""), set())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise SprintError(f"{_at(where, mark)}: not valid YAML: {shown(error.problem)}") from error
    except yaml.YAMLError as error:  # a character that YAML does not know
        raise SprintError(f"{where}: not valid YAML: {shown(error)}") from error
    keys = dict(_lines(root, "")) if root is not None else {}
    return Place(where, keys, is_group=root is None or isinstance(root, yaml.MappingNode))


def _at(where: str, mark: Any) -> str:
    return where if mark is None else f"{where}, line {mark.line + 1}"


def _check_depth(text: str, where: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise SprintError(f"{_at(where, event.start_mark)}: nested more than {DEEPEST} levels deep")


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def _written_out(node: yaml.Node, where: str, known: dict[int, int]) -> int:
    """How many values a node is, those behind an alias counted each time."""
    if id(node) not in known:
        known[id(node)] = LONGEST + 1  # until its end is found: an alias of what it stands in has none
        known[id(node)] = 1 + sum(_written_out(child, where, known) for child in _children(node))
        if known[id(node)] > LONGEST:
            raise SprintError(f"{_at(where, node.start_mark)}: more than {LONGEST:,} values, written out")
    return known[id(node)]


def _check_scalars(node: yaml.Node, where: str, reader: yaml.SafeLoader, seen: set[int]) -> None:
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:merge":
        try:
            reader.construct_object(node)
        except NOT_A_VALUE as error:
            text = shown(node.value, 40)
            raise SprintError(
                f"{_at(where, node.start_mark)}: {text!r} is not a value of {node.tag}"
            ) from error
    for child in _children(node):
        _check_scalars(child, where, reader, seen)


def _lines(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield f"{prefix}{key.value}", key.start_mark.line + 1
                yield from _lines(value, f"{prefix}{key.value}.")
