"""Reading: defaults, then the file, then `key=value` overrides; every value is checked as it is set."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from enum import Enum
from functools import cache, reduce
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sprint.base.door import read_text, shown
from sprint.base.errors import SprintError
from sprint.recipe.find import RECIPE_BYTES, find_recipe, place_of
from sprint.recipe.rules import validate
from sprint.recipe.schema import Recipe
from sprint.recipe.settings import undecided
from sprint.recipe.text import NOT_A_VALUE, Place, look_over
from sprint.recipe.unread import check_read

COMMAND_LINE = Place("command line", {})


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and validate a recipe.

    path        a file, or the bare name of one in ./recipes or in the package ("tiny")
    overrides   "key=value" with dotted keys and YAML values ("distill.optimizer.lr=2e-5")

    Raises `SprintError` for a missing or broken file, an unknown key (naming the nearest), a value of the
    wrong type, whatever `validate` refuses, and an override that nothing reads.
    """
    file = find_recipe(path)
    config = OmegaConf.structured(Recipe)
    place, content = _read_yaml(file)
    for key, value in content.items():
        _assign(config, str(key), value, place)
    paths, given = 0, []
    for override in overrides:
        key, value = _parse_override(override)
        given += _leaves(key, value)
        paths += key == "data.path"
        if paths > 1:
            raise SprintError(
                "command line: data.path is given twice; if the shell did that, put quotes around {…}"
            )
        _assign(config, key, value, COMMAND_LINE)
    try:
        recipe = OmegaConf.to_object(config)
    except (OmegaConfBaseException, *NOT_A_VALUE) as error:  # ${interpolations}
        raise SprintError(f"{place.name}: {_first_line(error)}") from error
    validate(recipe)
    check_read(recipe, given)
    return recipe


def recipe_text(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; `load_recipe` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe), resolve=True)


def recipe_hash(recipe: Recipe) -> str:
    """Twelve hex digits of SHA-256 over every setting that decides the result (see `setting`)."""
    settings = OmegaConf.to_container(OmegaConf.structured(recipe), resolve=True, enum_to_str=True)
    for key in undecided(recipe):
        *groups, name = key.split(".")
        del reduce(dict.__getitem__, groups, settings)[name]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _read_yaml(file: Path) -> tuple[Place, dict]:
    """Of a recipe's file: where its keys stand, and what they say."""
    text = read_text(file, RECIPE_BYTES)
    place = look_over(text, place_of(file))
    try:
        if place.is_group:
            loaded = OmegaConf.create(text)  # refuses duplicate keys, which plain YAML does not
            return place, OmegaConf.to_container(loaded, resolve=False)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise SprintError(f"{place.name}, line {line}: not valid YAML: {shown(error.problem)}") from error
    except (yaml.YAMLError, OmegaConfBaseException, *NOT_A_VALUE) as error:
        raise SprintError(f"{place.name}: not a readable recipe: {_first_line(error)}") from error
    raise SprintError(f"{place.name}: not a recipe: expected 'key: value' lines")


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals:
        raise SprintError(f"command line: {shown(repr(override))} is not an override; write key=value")
    if _keys().get(key) is str:
        return key, text
    try:
        look_over(text, "command line")
        return key, yaml.safe_load(text)
    except (yaml.YAMLError, SprintError, *NOT_A_VALUE) as error:
        why = str(error).rpartition(": ")[2] if isinstance(error, SprintError) else ""
        raise SprintError(
            f"command line: {shown(repr(override))}: the value is not valid YAML{why and f' ({why})'}"
        ) from error


def _assign(config: DictConfig, key: str, value: Any, place: Place) -> None:
    """Set one key; a mapping sets the keys under it."""
    keys, where = _keys(), place.of(key)
    if key not in keys:
        raise SprintError(f"{where}: {shown(repr(key))}: no such key; the nearest is {_nearest(key)}")
    if is_dataclass(keys[key]):
        if not isinstance(value, dict | None):
            raise SprintError(
                f"{where}: {key} = {shown(repr(value))}, but it is a group of keys, not a value"
            )
        for name, inner in (value or {}).items():
            _assign(config, f"{key}.{name}", inner, place)
        return
    if isinstance(value, str) and "\0" in value:
        raise SprintError(f"{where}: {key} = {shown(repr(value))}, but no name or path holds a NUL")
    if isinstance(value, str) and value != value.encode("utf-8", "ignore").decode():
        raise SprintError(f"{where}: {key} = {shown(repr(value))}, but a recipe is text in UTF-8")
    try:
        OmegaConf.update(config, key, value)
    except (OmegaConfBaseException, *NOT_A_VALUE) as error:
        raise SprintError(
            f"{where}: {key} = {shown(repr(value))}, but it takes {_expected(keys[key])}"
        ) from error


def _leaves(key: str, value: Any) -> Iterator[str]:
    """The settings that an override sets: one, or those of its group."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key


@cache
def _keys() -> dict[str, type]:
    """Every valid dotted key, of groups too, and its type."""
    return dict(_walk(Recipe, ""))


def _walk(group: type, prefix: str) -> Iterator[tuple[str, type]]:
    for name, kind in get_type_hints(group).items():
        yield prefix + name, kind
        if is_dataclass(kind):
            yield from _walk(kind, f"{prefix}{name}.")


def _nearest(key: str) -> str:
    """The valid key most like `key`: one with the same last name (a key at the wrong level), else any."""
    namesakes = [k for k in _keys() if k.rpartition(".")[2] == key.rpartition(".")[2]]
    return difflib.get_close_matches(key, namesakes or _keys(), n=1, cutoff=0.0)[0]


def _expected(kind: type) -> str:
    if get_origin(kind) is tuple:
        kinds = {int: "a list of whole numbers", float: "a list of numbers"}
        return kinds.get(get_args(kind)[0], "a list of lists of numbers")
    if issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _first_line(error: Exception) -> str:
    return shown((str(error).splitlines() or [type(error).__name__])[0])
