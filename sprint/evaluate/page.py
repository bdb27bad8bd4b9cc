"""The page of an evaluation: its figures, how they were taken, and the pictures, worst first."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from sprint.base.files import write_whole
from sprint.evaluate.metrics.registry import metric_of
from sprint.evaluate.result import Column, Figure, Result, Shot, Verdicts
from sprint.lab.categories import category_title
from sprint.pages import html
from sprint.pages.pictures import Cell, PictureRow, picture_rows
from sprint.pages.png import read_png

PAGE = "index.html"
PAGE_BYTES = 1_000_000  # of pictures on a page, as text; further rows are left out


def write_page(folder: Path, result: Result) -> Path:
    """-> FOLDER/index.html: one file with small pictures, each a link to the whole one."""
    return write_whole(Path(folder) / PAGE, page_html(Path(folder), result))


def page_html(folder: Path, result: Result) -> str:
    """Raises SprintError that names a picture that is damaged."""
    judged = [name for name in result.protocols if judged_columns(result, name)]
    return html.page(
        f"{result.name} · sprint evaluation",
        [
            html.masthead("Sprint · evaluation", result.name, _lead(result)),
            *left_out_notes(result),
            html.section("Figures", reading(result), figure_table(result), _source(result)),
            html.section("How they were taken", html.listing(protocol_words(result))),
            *(_pictures(folder, result, name, PAGE_BYTES // len(judged)) for name in judged),
            "" if judged else _unjudged(folder, result),
            _record(result),
        ],
    )


# ---- figures ----------------------------------------------------------------------------------------


def left_out_notes(result: Result) -> list[str]:
    """A paragraph for each metric that was not measured."""
    left_out = result.left_out.items()
    return [html.paragraph(f"{metric_of(name).title} left out: {line}", "note") for name, line in left_out]


def reading(result: Result, more: str = "") -> str:
    """A paragraph on how the figures are to be read."""
    sentences = [*(metric_of(name).reading for name in result.protocols), more]
    return html.paragraph(" ".join(filter(None, sentences))) if any(sentences) else ""


def figure_table(result: Result) -> str:
    """As HTML, published columns last."""
    head = [("", ""), *(column_title(column) for column in (*result.columns, *result.published))]
    return html.table(head, *figure_rows(result))


def figure_rows(result: Result) -> tuple[list[tuple[str, list[str]]], list[list[float | None]]]:
    """Rows of the table, published columns last, and the bars under its numbers."""
    rows, bars = [], []
    for (metric, name), figures in result.rows([*result.columns, *result.published]).items():
        share = metric_of(metric).unit == "share"
        rows.append((metric_of(metric).row(name), [figure_text(figure) for figure in figures]))
        bars.append([f.value if f and share else None for f in figures])
    return rows, bars


def figure_text(figure: Figure | None) -> str:
    return "–" if figure is None else str(figure)


def column_title(column: Column) -> tuple[str, str]:
    return column.who[:1].upper() + column.who[1:], html.steps(column.steps)


def _source(result: Result) -> str:
    return html.paragraph(f"{result.source}.", "note") if result.source else ""


def protocol_words(result: Result) -> dict[str, str]:
    """By metric's title, the facts of its protocol in one line."""
    return {
        metric_of(name).title: "; ".join(f"{fact}: {words}" for fact, words in facts.items() if words)
        for name, facts in result.protocols.items()
    }


def text_table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """For the terminal: names to the left, numbers to the right."""
    lines = [list(head), *([name, *cells] for name, cells in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            text.rjust(w) if i else text.ljust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def result_table(result: Result) -> str:
    """For the terminal: the figures, where published ones are from, and what was left out."""
    head = ["", *(column.title for column in (*result.columns, *result.published))]
    left_out = [f"{name} is left out: {line}" for name, line in result.left_out.items()]
    return "\n".join([text_table(head, figure_rows(result)[0]), *filter(None, [result.source]), *left_out])


def _lead(result: Result) -> str:
    ways: dict[str, list[int]] = {}
    for column in result.columns:
        ways.setdefault(column.who, []).append(column.steps)
    drawn = max((len(shots) for shots in result.sets.values()), default=0)
    told = "; ".join(
        f"{role} at {', '.join(map(str, counts[:-1]))}{', ' * (len(counts) > 1)}{html.steps(counts[-1])}"
        for role, counts in ways.items()
    )
    return f"{told[:1].upper()}{told[1:]}." + (f" {drawn} pictures each." if drawn else "")


# ---- pictures ---------------------------------------------------------------------------------------


def worst_first(result: Result, metric: str) -> list[int]:
    """Places in the metric's set: failed in most of the student's columns first, or lowest score of theirs.

    Of equally bad ones, those that the teacher gets right come first.
    """
    by_role = [(c.role, verdicts) for c in result.columns if (verdicts := c.verdicts(metric))]
    students = [verdicts for role, verdicts in by_role if role == "student"]
    judged = students or [verdicts for _, verdicts in by_role]
    others = [verdicts for role, verdicts in by_role if students and role == "teacher"]

    def badness(i: int) -> tuple[float, ...]:
        if judged[0].correct:
            return sum(v.correct[i] for v in judged), -sum(v.correct[i] for v in others)
        return (min(v.scores[i] for v in judged),)

    return sorted(range(len(result.sets[judged[0].prompts])), key=badness)


def _pictures(folder: Path, result: Result, metric: str, room: int) -> str:
    order = worst_first(result, metric)
    drawn, shown = judged_pictures(folder, result, metric, order, room)
    text = f"{shown} of {len(order)} prompts, worst first; the others are in the folders beside this page. "
    about = metric_of(metric)
    return html.section(f"Pictures: {about.title}", html.paragraph(text + about.below), drawn)


def _unjudged(folder: Path, result: Result) -> str:
    drawn, shown = plain_pictures(folder, result, PAGE_BYTES)
    whole = len(drawn_set(result))
    text = f"All {whole} prompts. Each picture is a link to the whole one."
    if shown < whole:
        text = f"{shown} of {whole} prompts; the others are in the folders beside this page."
    return html.section("Pictures", html.paragraph(text), drawn) if shown else ""


def plain_pictures(
    folder: Path, result: Result, room: int, most: int | None = None, place: Path | None = None
) -> tuple[str, int]:
    """What was drawn where no metric judges it: as `judged_pictures`, of the first `most` prompts."""
    columns, shots = drawn_columns(result), drawn_set(result)[:most]

    def cells(shot: Shot) -> list[Cell]:
        return [_cell(folder / column.folder / shot.file, place or folder) for column in columns]

    rows = (PictureRow(shot.prompt, shot_words(shot), cells(shot)) for shot in shots if columns)
    return picture_rows([column_title(c) for c in columns], rows, room)


def drawn_columns(result: Result) -> list[Column]:
    return [column for column in result.columns if column.folder]


def drawn_set(result: Result) -> Sequence[Shot]:
    """What was drawn first; empty where only time was measured."""
    return next(iter(result.sets.values()), ())


def judged_pictures(
    folder: Path,
    result: Result,
    metric: str,
    order: Iterable[int],
    room: int,
    place: Path | None = None,
    words: bool = True,
) -> tuple[str, int]:
    """A row for each of these prompts of the metric's set, a column for each of the result that it judged.

    folder   of the result;  place: of the page, by default the same one
    words    under each picture what the metric says of it, and not only whether it is right

    -> HTML of at most `room` bytes, and how many rows it has
    """
    columns, shots = judged_columns(result, metric), judged_set(result, metric)

    def cell(column: Column, i: int) -> Cell:
        file = folder / column.folder / shots[i].file
        found = judged_cell(file, place or folder, column.verdicts(metric), i)
        return found if words else replace(found, words="")

    rows = (PictureRow(shots[i].prompt, shot_words(shots[i]), [cell(c, i) for c in columns]) for i in order)
    return picture_rows([column_title(c) for c in columns], rows, room)


def judged_columns(result: Result, metric: str) -> list[Column]:
    """Those of whose pictures the metric says something."""
    return [column for column in result.columns if column.verdicts(metric)]


def judged_set(result: Result, metric: str) -> Sequence[Shot]:
    """What those columns show."""
    return result.sets[judged_columns(result, metric)[0].verdicts(metric).prompts]


def shot_words(shot: Shot) -> str:
    return f"{category_title(shot.group)} · seed {shot.seed}" if shot.group else f"seed {shot.seed}"


def judged_cell(file: Path, place: Path, verdicts: Verdicts, i: int) -> Cell:
    """Picture i of a set, linked from a page in `place`."""
    correct = verdicts.correct[i] if verdicts.correct else None
    return replace(_cell(file, place), words=verdict_words(verdicts, i), correct=correct)


def _cell(file: Path, place: Path) -> Cell:
    """A picture of which nothing is said, linked from a page in `place`."""
    link = quote(os.path.relpath(file, place).replace(os.sep, "/"))
    return Cell(read_png(file) if file.is_file() else None, link)


def verdict_words(verdicts: Verdicts, i: int) -> str:
    """What a metric says of picture i."""
    return verdicts.reasons[i] if verdicts.reasons else f"{verdicts.scores[i]:.1f}"


# ---- the record -------------------------------------------------------------------------------------


def _record(result: Result) -> str:
    models = {column.model: _model_words(column) for column in result.columns}
    return html.section(
        "To make it again",
        html.code(result.command),
        html.listing({**models, **result.settings, **result.environment, "made": result.made}),
        html.code(result.recipe),
    )


def _model_words(column: Column) -> str:
    """Its hash, and depth, size and dtype where they are told."""
    digest = f"SHA-256 {column.hash[:16]}…" if column.hash else "not hashed"
    depth, size = (f"{n} {unit}" if n else "" for n, unit in ((column.depth, "blocks"), (column.size, "px")))
    return ", ".join(filter(None, [digest, depth, size, column.dtype]))
