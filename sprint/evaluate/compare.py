"""`sprint compare`: evaluations side by side, and what differs in how they were taken."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.evaluate.metrics.metric import Error
from sprint.evaluate.metrics.registry import METRICS, metric_of
from sprint.evaluate.page import (
    PAGE_BYTES,
    column_title,
    figure_text,
    judged_cell,
    shot_words,
    text_table,
)
from sprint.evaluate.result import Column, Figure, Result, Shot, Verdicts, read_result
from sprint.pages import html
from sprint.pages.pictures import PictureRow, picture_rows

BEST = " *"  # after the best figure of a row
NOISE = 2.0  # standard errors within which a difference may be chance
ALIKE = ("seeds", "guidance", "dtype")  # settings that decide what is drawn
Key = tuple[
    str, int
]  # role, with a name where it repeats, and steps: columns that are held against each other
Figures = Sequence[Figure | None]


@dataclass(frozen=True)
class Side:
    """One of the evaluations. `label` tells it from the others."""

    label: str
    folder: Path
    result: Result

    @property
    def columns(self) -> dict[Key, Column]:
        return {(column.who, column.steps): column for column in self.result.columns}


def compare(paths: Sequence[str], page: Path) -> str:
    """Write the page.  -> table, differences in protocol and the page's name, for the terminal

    Raises SprintError for fewer than two results, for what is no result, and for a damaged picture.
    """
    if len(paths) < 2:
        raise SprintError("compare takes two results or more; `sprint evaluate` makes them")
    sides = _sides(paths)
    rows = [
        (metric_of(metric).row(name), marked(figures))
        for (metric, name), figures in joined_rows(sides).items()
    ]
    head = [(side.label, column.title) for side in sides for column in side.result.columns]
    warnings = differing_protocols(sides)
    write_whole(page, _page(sides, head, rows, warnings, page.parent))
    aligned = [
        (name, [cell if cell.endswith(BEST) else cell + " " * len(BEST) for cell in cells])
        for name, cells in rows
    ]
    labels, titles = zip(*head, strict=True)
    table = text_table(["", *labels], [("", titles), *aligned])
    return "\n".join([table, "* best of its row", *(f"beware: {line}" for line in warnings), f"page: {page}"])


def _sides(paths: Sequence[str]) -> list[Side]:
    results = [read_result(path) for path in paths]
    folders = [Path(path) if Path(path).is_dir() else Path(path).parent for path in paths]
    labels = [result.name for result in results]
    if len(set(labels)) < len(labels):
        labels = [folder.resolve().name for folder in folders]
    if len(set(labels)) < len(labels):
        labels = list(paths)
    return [Side(*parts) for parts in zip(labels, folders, results, strict=True)]


# ---- figures ----------------------------------------------------------------------------------------


def joined_rows(sides: Sequence[Side]) -> dict[tuple[str, str], list[Figure | None]]:
    """Every figure of any side: (metric, name) -> one for each column of each side."""
    tables = [side.result.rows() for side in sides]
    names = dict.fromkeys(
        name for metric in METRICS for table in tables for name in table if name[0] == metric
    )
    return {
        name: [
            figure
            for side, table in zip(sides, tables, strict=True)
            for figure in table.get(name, [None] * len(side.result.columns))
        ]
        for name in names
    }


def marked(figures: Figures) -> list[str]:
    """As text, with a mark after the best where there are several to choose from."""
    finite = [figure for figure in figures if figure and math.isfinite(figure.value)]
    best = (max if finite and finite[0].higher else min)((f.value for f in finite), default=None)
    return [
        figure_text(figure) + (BEST if len(finite) > 1 and figure and figure.value == best else "")
        for figure in figures
    ]


def difference(metric: str, before: Figure | None, after: Figure | None) -> str:
    """after − before, and whether that may be chance: the errors of both, as if independent."""
    if not (before and after and math.isfinite(before.value) and math.isfinite(after.value)):
        return "–"
    value = after.value - before.value
    text = f"{value:+{after.spec}}"
    if metric_of(metric).error is not Error.standard or before.error is None or after.error is None:
        return text
    error = math.hypot(before.error, after.error)
    return f"{text} ± {error:{after.spec}}" + (", noise" if abs(value) <= NOISE * error else "")


def differing_protocols(sides: Sequence[Side]) -> list[str]:
    """Why figures may not compare, a line for each fact in which the sides differ."""
    lines = []
    for name in ALIKE:
        lines += _differing(name, {side.label: side.result.settings.get(name) for side in sides})
    for metric in METRICS:
        measured = [side for side in sides if metric in side.result.protocols]
        facts = dict.fromkeys(fact for side in measured for fact in side.result.protocols[metric])
        for fact in facts:
            told = {side.label: side.result.protocols[metric].get(fact) for side in measured}
            lines += _differing(f"{METRICS[metric].title}, {fact}", told)
    return lines


def _differing(what: str, told: dict[str, str | None]) -> list[str]:
    if len(set(told.values())) < 2:
        return []
    return [
        f"{what} differ: " + "; ".join(f"{label}: {value or 'not told'}" for label, value in told.items())
    ]


# ---- the page ---------------------------------------------------------------------------------------


def _page(
    sides: Sequence[Side],
    head: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, Sequence[str]]],
    warnings: Sequence[str],
    place: Path,
) -> str:
    names = " · ".join(side.label for side in sides)
    judged = [metric for metric in METRICS if all(_verdicts(side, metric) for side in sides)]
    return html.page(
        f"{names} · sprint comparison",
        [
            html.masthead("Sprint · comparison", names, "The best figure of each row has an asterisk."),
            *(html.paragraph(f"Beware: {line}.", "note") for line in warnings),
            html.section("Figures", html.table([("", ""), *head], rows)),
            *(_differences(sides[0], side) for side in sides[1:]),
            *(_pictures(sides, metric, place, PAGE_BYTES // len(judged)) for metric in judged),
        ],
    )


def _differences(first: Side, other: Side) -> str:
    keys = [key for key in first.columns if key in other.columns]
    pairs = [(first.columns[key], other.columns[key]) for key in keys]
    rows = []
    for metric, name in joined_rows([first, other]):
        figures = [(a.figure(metric, name), b.figure(metric, name)) for a, b in pairs]
        cells = [difference(metric, *pair) for pair in figures]
        if any(cell != "–" for cell in cells):
            rows.append((metric_of(metric).row(name), cells))
    text = (
        f"{other.label} less {first.label}, where both have the column. Noise: within {NOISE:g} standard errors of "
        "the two, as if their pictures were independent; for the same prompts and seeds that is cautious."
    )
    head = [("", ""), *(column_title(a) for a, _ in pairs)]
    drawn = [html.paragraph(text), html.table(head, rows)] if rows else []
    return html.section(f"Differences: {other.label} less {first.label}", *drawn)


# ---- pictures ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One prompt and seed in columns of the same kind, one for each side; `places` in their sets."""

    shot: Shot
    columns: Sequence[Column]
    verdicts: Sequence[Verdicts]
    places: Sequence[int]

    @property
    def values(self) -> list[float]:
        return [float((v.correct or v.scores)[i]) for v, i in zip(self.verdicts, self.places, strict=True)]

    @property
    def rank(self) -> tuple[float, float]:
        """Largest difference first, and of equal ones those that got worse."""
        values = self.values
        return min(values) - max(values), values[-1] - values[0]


def pairs_of(sides: Sequence[Side], metric: str) -> Iterator[Pair]:
    """Every prompt and seed that all sides have in a column of the same role and steps."""
    found = [_verdicts(side, metric) for side in sides]
    for key in found[0]:
        if not all(key in by_key for by_key in found):
            continue
        verdicts = [by_key[key] for by_key in found]
        places = [_places(side, v.prompts) for side, v in zip(sides, verdicts, strict=True)]
        for shot in places[0]:
            if all(shot in there for there in places):
                columns = [side.columns[key] for side in sides]
                yield Pair(shot, columns, verdicts, [there[shot] for there in places])


def _places(side: Side, prompts: str) -> dict[Shot, int]:
    return {shot: place for place, shot in enumerate(side.result.sets[prompts])}


def _verdicts(side: Side, metric: str) -> dict[Key, Verdicts]:
    return {key: verdicts for key, c in side.columns.items() if (verdicts := c.verdicts(metric))}


def _pictures(sides: Sequence[Side], metric: str, place: Path, room: int) -> str:
    pairs = list(pairs_of(sides, metric))
    differing = sorted((pair for pair in pairs if pair.rank[0] < 0), key=lambda pair: pair.rank)
    rows = map(partial(_row, sides, place), differing)
    drawn, shown = picture_rows([(side.label, "") for side in sides], rows, room)
    text = (
        f"{len(differing)} of {len(pairs)} pictures of the same prompt, seed, model's role and steps are judged "
        f"differently. {shown} are shown, largest difference first."
    )
    return html.section(f"Pictures: {METRICS[metric].title}", html.paragraph(text), drawn if shown else "")


def _row(sides: Sequence[Side], place: Path, pair: Pair) -> PictureRow:
    parts = zip(sides, pair.columns, pair.verdicts, pair.places, strict=True)
    cells = [
        judged_cell(side.folder / column.folder / pair.shot.file, place, verdicts, i)
        for side, column, verdicts, i in parts
    ]
    return PictureRow(pair.shot.prompt, f"{pair.columns[0].title} · {shot_words(pair.shot)}", cells)
