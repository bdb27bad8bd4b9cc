"""A finding: how bad, about what, in words, and what to do. And the lines that a person reads."""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from sprint.base.door import shown


class Level(IntEnum):
    """The worst comes first."""

    wrong = 0  # the result cannot be good while this stands
    note = 1  # worth knowing, or a likely cause if the result is bad
    ok = 2


class Finding(NamedTuple):
    """about   a word or two: "weights"
    what    what was seen
    do      what to do about it; empty where there is nothing to do
    """

    level: Level
    about: str
    what: str
    do: str = ""


def ok(about: str, what: str) -> Finding:
    return Finding(Level.ok, about, what)


def note(about: str, what: str, do: str = "") -> Finding:
    return Finding(Level.note, about, what, do)


def wrong(about: str, what: str, do: str) -> Finding:
    return Finding(Level.wrong, about, what, do)


def refused(about: str, error: Exception, do: str = "mend that first") -> Finding:
    """What another part of the toolkit refused, as a finding: its line says what is wrong."""
    return wrong(about, str(error), do)


def verdict(thing: str, findings: Sequence[Finding]) -> str:
    """The first line: "runs/tiny: nothing is wrong (14 checks, 2 notes)"."""
    bad = [one for one in findings if one.level is Level.wrong]
    notes = sum(one.level is Level.note for one in findings)
    told = f"{_count(len(findings), 'check')}, {_count(notes, 'note')}"
    if not bad:
        return f"{shown(thing)}: nothing is wrong ({told})"
    things = f"{len(bad)} things are wrong" if len(bad) > 1 else "1 thing is wrong"
    return f"{shown(thing)}: {things}, first {bad[0].about} ({told})"


def lines(findings: Iterable[Finding]) -> list[str]:
    """One for each finding, and one under it where there is something to do; the worst first, aligned."""
    found = sorted(findings, key=lambda one: one.level)
    wide = max((len(one.about) for one in found), default=0)
    text = []
    for one in found:
        text.append(f"{one.level.name:<5}  {one.about:<{wide}}  {shown(one.what, 1000)}")
        if one.do:
            text.append(f"{'':<5}  {'':<{wide}}  → {one.do}")
    return text


def exit_code(findings: Iterable[Finding]) -> int:
    """1 where something is wrong, else 0."""
    return int(any(one.level is Level.wrong for one in findings))


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
