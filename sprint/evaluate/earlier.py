"""What an evaluation finds in its folder: an earlier one, whose figures still hold or do not."""

import dataclasses
import logging
import re
from collections.abc import Hashable, Mapping
from pathlib import Path

from sprint.base.errors import SprintError
from sprint.evaluate.metrics.registry import metric_of
from sprint.evaluate.models import Model, same_place
from sprint.evaluate.result import FILE, Column, Measured, Result, read_result
from sprint.weights.model_hash import model_hash

log = logging.getLogger(__name__)
DRAWN_ALIKE = ("seeds", "guidance")  # settings that decide figures, and that columns do not tell
# what runs once kept of their evaluation
BEFORE = re.compile(r"(teacher|undistilled|student)_\d+\.(json|npz)")


def open_out(out: Path, pictures: str, model: Model) -> Result | None:
    """The earlier evaluation in OUT, if there is one that can be read.

    pictures   the folder that an unfinished one has there

    Raises SprintError for a file, for a folder of something else, and for an evaluation of another model.
    """
    if out.exists() and not out.is_dir():
        raise SprintError(f"--out {out} is not a folder; give another one")
    if not (out / FILE).is_file():
        names = (file.name for file in sorted(out.glob("[!.]*")))
        stranger = next((name for name in names if not BEFORE.fullmatch(name)), None)
        if stranger and not (out / pictures).is_dir():
            raise SprintError(f"--out {out}: holds {stranger} and no evaluation; give another folder")
        return None
    try:
        earlier = read_result(out)
    except SprintError as error:
        log.warning("%s; it is written anew", error)
        return None
    first = earlier.columns[0]
    if not same_place(first.model, model.path) and not _same_weights(first.hash, model):
        raise SprintError(
            f"{out}: holds an evaluation of {first.model}, and this is {model.path}; give another --out"
        )
    return earlier


def _same_weights(digest: str, model: Model) -> bool:
    try:
        return digest == model_hash(model.path, model.family)
    except SprintError:  # not on this machine yet, so it is not what was evaluated here
        return False


def with_earlier(new: Result, earlier: Result) -> tuple[Result, list[str]]:
    """Add what an earlier evaluation in the same folder measured and the new one did not.

    A metric stays in columns of the same weights, times, size and dtype, where guidance, prompts and seeds are
    the same.  -> the result, and what was dropped and why, a line each
    """
    dropped, kept = [], {}
    for metric in earlier.protocols:
        if metric in new.protocols:
            continue
        if reason := _differs(metric, new, earlier):
            dropped.append(f"{metric}: {reason}")
        elif found := _measured(metric, earlier):
            kept[metric] = found
    places = {_identity(column) for column in new.columns}
    gone = [column for column in earlier.columns if _identity(column) not in places and column.hash]
    titles = {column.title for column in new.columns}
    for column in gone:
        reason = "weights, times, size or dtype are others now" if column.title in titles else "not asked for"
        dropped.append(f"{column.title}: {reason}")
    return _joined(new, earlier, kept), dropped


def measured_before(
    metric: str, protocol: Mapping[str, str], prompts: str, new: Result, earlier: Result
) -> list[Measured] | None:
    """What a metric said of every column of the new result in the earlier one, if it would say the same again.

    protocol   how it measures now, as far as that is known;  prompts: the set that it looks at

    None where models, times, prompts, seeds, guidance or a fact of the protocol are others, or a column is new.
    """
    was = earlier.protocols.get(metric, {})
    if earlier.used.get(metric) != prompts or any(was.get(fact) != words for fact, words in protocol.items()):
        return None
    found = _measured(metric, earlier)
    if _differs(metric, new, earlier) or any(_identity(column) not in found for column in new.columns):
        return None
    return [found[_identity(column)] for column in new.columns]


def _differs(metric: str, new: Result, earlier: Result) -> str:
    """Why a metric's earlier figures cannot stand beside the new ones, or ""."""
    for name in DRAWN_ALIKE:
        was, now = earlier.settings.get(name), new.settings.get(name)
        if was != now:
            return f"{name}: {was}, now {now}"
    drawn = earlier.used.get(metric)
    if metric_of(metric).pictures and drawn not in earlier.sets:
        return "it does not say which pictures it looked at"
    if drawn in new.sets and list(new.sets[drawn]) != list(earlier.sets[drawn]):
        return "prompts are others now"
    return ""


def _identity(column: Column) -> Hashable:
    about = column.role, column.steps, column.hash, tuple(column.times), column.size, column.dtype
    return about if column.hash else (*about, column.model)


def _measured(metric: str, result: Result) -> dict[Hashable, Measured]:
    return {_identity(c): c.measured[metric] for c in result.columns if metric in c.measured}


def _joined(new: Result, earlier: Result, kept: Mapping[str, Mapping[Hashable, Measured]]) -> Result:
    columns, stayed = [], set()
    for column in new.columns:
        found = {
            m: by_column[_identity(column)] for m, by_column in kept.items() if _identity(column) in by_column
        }
        stayed |= found.keys()
        columns.append(dataclasses.replace(column, measured={**found, **column.measured}))
    if not stayed:
        return new
    there = {_identity(column) for column in columns}
    timed = [
        c for c in earlier.columns if not c.hash and _identity(c) not in there and stayed & c.measured.keys()
    ]
    used = {metric: earlier.used[metric] for metric in stayed & earlier.used.keys()}
    return dataclasses.replace(
        new,
        columns=[*columns, *timed],
        sets={name: earlier.sets[name] for name in used.values()} | new.sets,
        used=used | new.used,
        protocols=new.protocols | {metric: earlier.protocols[metric] for metric in stayed},
        left_out={metric: line for metric, line in new.left_out.items() if metric not in stayed},
        command="\n".join(dict.fromkeys([*earlier.command.splitlines(), *new.command.splitlines()])),
    )
