"""What a field of a recipe says of itself beside its type: the values it takes, and whether it decides the result."""

import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes."""

    words: str  # as in "it must be at least 0"
    holds: Callable[[float], bool]


HIGHEST = 10**9  # of whatever has no end of its own: nobody means more, and int64 and float32 still hold it
SEEDS = 2**63  # of torch's generators: seeds are below it


def at_least(low: int) -> Range:
    return Range(f"at least {low} and at most {HIGHEST:,}", lambda v: low <= v <= HIGHEST)


def between(low: int, high: int) -> Range:
    return Range(f"from {low} to {high:,}", lambda v: low <= v <= high)


ABOVE_0 = Range("above 0", lambda v: 0 < v < math.inf)
FINITE = Range("finite", math.isfinite)
SHARE = Range("between 0 and 1", lambda v: 0 <= v <= 1)
SHARE_BELOW_1 = Range("at least 0 and below 1", lambda v: 0 <= v < 1)
# of a run, or of a first picture: the next ones count up
SEED = Range("at least 0 and below 2**62", lambda v: 0 <= v < SEEDS // 2)
DEPTH = between(0, 512)
GUIDANCE = between(0, 1000)
# of a sampler, or of updates in a row: each is there at once, in a list of times or of turns
STEPS = between(1, 1000)


LATER = {"later": True}  # metadata of a group that came when there were runs already


def setting(
    default: Value,
    takes: Range | None = None,
    decides: bool = True,
    kinds: tuple[str, ...] = (),
    later: bool = False,
) -> Value:
    """A field of a recipe's group, with more to say than its type and default.

    takes    the numbers it may be; `validate` refuses others
    decides  whether another value makes another result. `recipe_hash` leaves the rest out, and a run goes on
             with another value of it.
    kinds    of data that read it; none: all do
    later    whether it came when there were runs already: its default is what they did, and changes no hash

        timeout: int = setting(600, at_least(1), decides=False)
    """
    return field(
        default=default, metadata={"takes": takes, "decides": decides, "kinds": kinds, "later": later}
    )


def takes(one: Field) -> Range | None:
    return one.metadata.get("takes")


def decides(one: Field, value: Any) -> bool:
    """Whether the hash of a recipe that has this value counts it."""
    default = one.default if one.default_factory is MISSING else one.default_factory()
    as_before = one.metadata.get("later", False) and value == default
    return one.metadata.get("decides", True) and not as_before


def kinds(one: Field) -> tuple[str, ...]:
    return one.metadata.get("kinds", ())


def undecided(group: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the fields and groups in `group` that decide nothing."""
    for one in fields(group):
        key, value = f"{prefix}{one.name}", getattr(group, one.name)
        if not decides(one, value):
            yield key
        elif is_dataclass(value):
            yield from undecided(value, f"{key}.")


def each_setting(group: Any, prefix: str = "") -> Iterator[tuple[str, Field, Any]]:
    """(dotted key, field, value) of every field in `group` and in the groups within it."""
    for one in fields(group):
        key, value = f"{prefix}{one.name}", getattr(group, one.name)
        if is_dataclass(value):
            yield from each_setting(value, f"{key}.")
        else:
            yield key, one, value
