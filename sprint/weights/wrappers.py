"""Where are a file's weights? Under which key, and behind which prefix, trainers and bundles put a network.

Every tensor has a path (the keys of the dicts around it) and a name. A network is found by its names, which a family's
key table knows; what stands before them is what somebody put around it. So a wrapper need not be known by its name,
but for those that torch puts between the parts of a name.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import takewhile
from typing import Generic, NamedTuple, TypeVar

from sprint.base.door import shown
from sprint.base.errors import SprintError
from sprint.models import families
from sprint.weights.keys import LOGVAR_KEYS, table_names
from sprint.weights.tells import adapter, looks_like

# Parts of names that torch and its trainers put anywhere: compile, FSDP, activation checkpointing, DeepSpeed, Opacus.
BETWEEN = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_module"}
# What lies beside a network in files that hold a whole pipeline, by the first part of its name.
BUNDLED = re.compile(
    r"(vae|autoencoder|first_stage_model|text_encoders?(_\d)?|cond_stage_model|conditioner|tokenizer|image_encoder"
    r"|model_ema|scheduler)"
)
LONGEST_NAME = 500  # characters of a tensor's name
MOST_TENSORS = 4000  # of a network: the largest known has 1,500
MOST_LISTED = 50  # names of what is left out

T = TypeVar("T")
Leaf = tuple[tuple[str, ...], str]  # of a tensor: the keys of the dicts around it, and its name there


class Place(NamedTuple):
    """Where a network lies: the keys of the dicts around it, and what stands before its names there."""

    path: tuple[str, ...]
    prefix: str  # without its last dot; "" where there is none

    def __str__(self) -> str:
        return ".".join((*self.path, *([self.prefix] if self.prefix else []))) or "."


class Found(NamedTuple, Generic[T]):
    """A network's tensors by their own names, and what is there to be said about the rest."""

    place: Place
    tensors: dict[str, T]
    unwrapped: list[str]  # what was taken from before or between the names
    left_out: list[str]


def find_network(
    where: str, leaves: Mapping[Leaf, T | None], counters: Collection[Leaf] = (), weights: str | None = None
) -> Found[T]:
    """The one network among tensors, or of several the one at `weights`.

    where     names the source in messages
    leaves    None for what is no tensor
    counters  those of the tensors that are single whole numbers, as trainers keep beside weights

    Raises SprintError where there is none, where there are several and `weights` does not choose, for adapters,
    and where two tensors have one name once their wrappers are off.
    """
    known = _known_names()
    names = [leaf for leaf, tensor in leaves.items() if tensor is not None]
    places = networks_in(names, known)
    place = _chosen(where, places, weights, names)
    inside = [other for other in places if other.path == place.path and len(other.prefix) > len(place.prefix)]
    tensors: dict[str, T] = {}
    origin: dict[str, str] = {}
    left_out: dict[str, None] = {}
    for leaf, tensor in leaves.items():
        elsewhere = any(_own_name(leaf, other) is not None for other in inside)
        own = None if elsewhere else _own_name(leaf, place)
        if own is None or tensor is None:
            left_out[_label(leaf, place)] = None
        elif leaf in counters and _pattern(own) not in known:
            left_out[own] = None
        elif own in tensors:
            twice = f"{shown(origin[own])} and {shown(leaf[1])}"
            raise SprintError(f"{where}: {twice} have one name, {shown(own)}, once their wrappers are off")
        else:
            tensors[own], origin[own] = tensor, leaf[1]
    if len(tensors) > MOST_TENSORS:
        raise SprintError(f"{where} holds {len(tensors):,} tensors; a network has at most {MOST_TENSORS:,}")
    if what := adapter(tensors):
        raise SprintError(f"{where} is {what}")
    if 2 * sum(_pattern(own) in known for own in tensors) < len(tensors):
        raise _stranger(where, tensors)
    return Found(place, tensors, _taken_off(place, origin.values()), list(left_out)[:MOST_LISTED])


def networks_in(leaves: Iterable[Leaf], known: Collection[str] | None = None) -> dict[Place, int]:
    """Where networks lie, and how many known tensors each has; parts smaller than half of the largest are none."""
    known = _known_names() if known is None else known
    counts: Counter[Place] = Counter()
    for path, name in leaves:
        parts = _parts(name)
        for start in range(len(parts)):
            if _pattern(".".join(parts[start:])) in known:
                counts[Place(path, ".".join(parts[:start]))] += 1
                break
    most = max(counts.values(), default=0)
    return {place: count for place, count in counts.items() if 2 * count >= most}


# ---- names --------------------------------------------------------------------------------------------


def _known_names() -> set[str]:
    names = {*LOGVAR_KEYS}
    for family in families.FAMILIES:
        names |= {*table_names(family.keys), *family.keys.extras}
    return set(map(_pattern, names))


def _pattern(name: str) -> str:
    """The name with # for every number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)


def _parts(name: str) -> list[str]:
    """Without what torch puts between; a name that no module has, has none."""
    return [part for part in name.split(".") if part not in BETWEEN] if len(name) <= LONGEST_NAME else []


def _own_name(leaf: Leaf, place: Place) -> str | None:
    """What the network itself calls a tensor; None for one that lies elsewhere."""
    path, name = leaf
    parts, prefix = _parts(name), place.prefix.split(".") if place.prefix else []
    if path != place.path or parts[: len(prefix)] != prefix or len(parts) <= len(prefix):
        return None
    if not prefix and len(parts) > 1 and BUNDLED.fullmatch(parts[0]):
        return None
    return ".".join(parts[len(prefix) :])


def _label(leaf: Leaf, place: Place) -> str:
    """What is left out, named as shortly as tells it from the network."""
    whole, inside = (*leaf[0], *leaf[1].split(".")), (*place.path, *place.prefix.split("."))
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(whole, inside, strict=False))))
    return shown(".".join(whole[: shared + 1]))


def _taken_off(place: Place, names: Iterable[str]) -> list[str]:
    between = {part for name in names for part in name.split(".") if part in BETWEEN}
    return [f"{part}." for part in [*([place.prefix] if place.prefix else []), *sorted(between)]]


# ---- choosing -----------------------------------------------------------------------------------------


def _chosen(where: str, places: Mapping[Place, int], weights: str | None, leaves: Iterable[Leaf]) -> Place:
    if not places:
        raise _stranger(where, [name for _, name in leaves])
    fitting = list(places)
    if weights is not None:
        exact = [place for place in places if str(place) == weights]
        fitting = exact or [place for place in places if str(place).startswith(f"{weights}.")]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(f"{shown(place)} ({count} tensors)" for place, count in places.items())
    if weights is None or fitting:
        raise SprintError(f"{where} holds {len(places)} networks: {listed}; choose one with --weights KEY")
    raise SprintError(f"{where} has no network at --weights {shown(weights)}; it holds {listed}")


def _stranger(where: str, names: Collection[str]) -> SprintError:
    if not names:
        return SprintError(f"{where} holds no tensor")
    guess = looks_like(names)
    what = f"it looks like {guess}" if guess else f"its keys are like {shown(next(iter(names)))}"
    return SprintError(f"{where} is not a {families.titles()} transformer: {what}")
