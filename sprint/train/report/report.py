"""The page people look at: a run's evaluation, with its curves, costs, goals and recipe around it.

Three files in the run's folder: report.html (self-contained), samples.png (the picture grid) and
report.json (the same without pictures). Whatever was not measured is None or empty and is left out.
"""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sprint.base.files import write_whole
from sprint.evaluate.metrics.registry import SCENES
from sprint.evaluate.models import OF_A_RUN, UNDISTILLED
from sprint.evaluate.page import (
    PAGE,
    PAGE_BYTES,
    column_title,
    drawn_columns,
    drawn_set,
    figure_table,
    judged_columns,
    judged_pictures,
    judged_set,
    left_out_notes,
    plain_pictures,
    protocol_words,
    reading,
)
from sprint.evaluate.result import Result, plain
from sprint.lab.series import SHOWN
from sprint.pages import html
from sprint.pages.grid import picture_grid
from sprint.pages.png import read_png
from sprint.train.report.curves import Curve, in_order
from sprint.train.report.spread import GENERAL
from sprint.train.report.verdict import Goal, column_data, headline, in_reading_order, key_figures

OF_THE_UNDISTILLED = "Undistilled is the adapted teacher asked to do what the student does."


@dataclass(frozen=True)
class Report:
    name: str  # of the recipe
    result: Result | None = None  # the run's evaluation, which lies in the folder `OF_A_RUN`
    goals: Sequence[Goal] = ()
    curves: Sequence[Curve] = ()
    update_times: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # kind of update: part: ms
    seconds: Mapping[str, float] = field(default_factory=dict)  # by part of the run, in order
    peak_memory: int | None = None  # bytes
    recipe: str = ""  # resolved, as YAML
    command: str = ""  # that makes this run again
    environment: Mapping[str, str] = field(default_factory=dict)  # {"torch": "2.11.0", "CPU": "…"}
    notes: Sequence[str] = ()  # whatever a reader must know; set under the scores
    spread: str = GENERAL  # what another seed or another processor would change, in words


# ---- writing ----------------------------------------------------------------------------------------


def write_report(folder: Path, report: Report) -> Path:
    """Write report.html, report.json and, where pictures were judged, samples.png.  -> path of the page"""
    folder = Path(folder)
    if report.result:
        report = dataclasses.replace(report, result=in_reading_order(report.result))
        write_samples(folder, report.result)
    write_whole(folder / "report.json", json.dumps(report_data(report), indent=2) + "\n")
    return write_whole(folder / "report.html", report_html(folder, report))


def write_samples(folder: Path, result: Result) -> None:
    """FOLDER/samples.png: the first pictures of every column; none without pictures."""
    scored = judged_columns(result, SCENES.name)
    columns = scored or drawn_columns(result)
    shots = (judged_set(result, SCENES.name) if scored else drawn_set(result))[:SHOWN]
    if not columns or not shots:
        return
    pictures = [[read_png(folder / OF_A_RUN / c.folder / shot.file) for shot in shots] for c in columns]
    grid = picture_grid([column_title(c) for c in columns], [shot.prompt for shot in shots], pictures)
    data = io.BytesIO()
    grid.save(data, "PNG", optimize=True)
    write_whole(folder / "samples.png", data.getvalue())


def report_data(report: Report) -> dict:
    """The report as plain data, without pictures; numbers that are not finite become null."""
    data = dataclasses.asdict(dataclasses.replace(report, result=None))
    del data["result"]
    columns = report.result.columns if report.result else ()
    return plain(data | {"columns": [column_data(column) for column in columns]})


def report_html(folder: Path, report: Report) -> str:
    """The whole page as text. Raises SprintError that names a picture that is damaged."""
    return html.page(
        f"{report.name} · sprint report",
        [
            html.masthead("Sprint · distillation report", report.name, headline(report.result, report.goals)),
            _key_figures(report),
            *(_evaluated(folder, report, report.result) if report.result else ()),
            html.section("What else to know", *(html.paragraph(note, "note") for note in report.notes)),
            _curves(report),
            _update_times(report),
            _cost(report),
            _record(report),
        ],
    )


# ---- sections ---------------------------------------------------------------------------------------


def _key_figures(report: Report) -> str:
    figures = key_figures(report.result) if report.result else []
    if report.seconds:
        memory = f"at most {html.memory(report.peak_memory)} of memory" if report.peak_memory else ""
        whole = html.duration(sum(report.seconds.values()))
        figures.append((whole, "training and evaluation", memory))
    return html.figures(figures)


def _evaluated(folder: Path, report: Report, result: Result) -> list[str]:
    """What the evaluation found: pictures, figures, goals, and how they were taken."""
    prompts = max((len(shots) for shots in result.sets.values()), default=0)
    if not judged_columns(result, SCENES.name):
        return [*left_out_notes(result), _unscored(folder, result, prompts)]
    words = reading(result, f"± is over prompts alone. {report.spread} All on {prompts} held-out prompts.")
    goals = html.checklist([(g.text, g.goal, g.value, g.met) for g in report.goals])
    return [
        *left_out_notes(result),
        _pictures(folder, result),
        html.section("Scores", words, figure_table(result), goals),
        html.section("How they were taken", html.listing(protocol_words(result))),
    ]


def _unscored(folder: Path, result: Result, prompts: int) -> str:
    """Pictures of the run's own captions: the first of them, and what a picture took."""
    drawn, _ = plain_pictures(folder / OF_A_RUN, result, PAGE_BYTES, SHOWN, folder)
    text = (
        "Each row is one caption that the run learned from, with one seed; each column is one way to sample it. "
        "Nothing here is a score: other prompts than its own say more, with sprint sample."
    )
    if any(column.role == UNDISTILLED for column in result.columns):
        text += f" {OF_THE_UNDISTILLED}"
    more = html.link(f"{OF_A_RUN}/{PAGE}", f"All {prompts} captions")
    return html.section("Pictures", html.paragraph(text), drawn, more, figure_table(result))


def _pictures(folder: Path, result: Result) -> str:
    if not (columns := judged_columns(result, SCENES.name)):
        return ""
    shown = range(min(SHOWN, len(judged_set(result, SCENES.name))))
    place = folder / OF_A_RUN
    drawn, _ = judged_pictures(place, result, SCENES.name, shown, PAGE_BYTES, folder, words=False)
    text = (
        "Each row is one prompt and one seed; each column is one way to sample it. "
        "✓: the picture shows what the prompt says."
    )
    if any(column.role == UNDISTILLED for column in columns):
        text += f" {OF_THE_UNDISTILLED}"
    more = html.link(f"{OF_A_RUN}/{PAGE}", "All prompts, worst first, with what was seen in each picture")
    return html.section("Pictures", html.paragraph(text), drawn, more)


def _curves(report: Report) -> str:
    drawn = [
        html.chart(c.title, c.lines, c.x_label, c.y_label, c.log_y, c.note)
        for c in report.curves
        if _drawable(c)
    ]
    text = html.paragraph("Faint: every logged step. Strong: their running median, which sets the scale.")
    return html.section("Training", text if drawn else "", html.charts(drawn))


def _update_times(report: Report) -> str:
    """A bar for each kind of update, and the same in numbers."""
    kinds = {name: times for name, times in report.update_times.items() if sum(times.values()) > 0}
    if not kinds:
        return ""
    wholes = {name: sum(times.values()) for name, times in kinds.items()}
    bars = [(name, _milliseconds(wholes[name]), list(times.items())) for name, times in kinds.items()]
    parts = in_order(part for times in kinds.values() for part in times)
    rows = [("the whole update", [_milliseconds(whole) for whole in wholes.values()])]
    for part in parts:
        rows.append((part, [_milliseconds(t.get(part), wholes[name]) for name, t in kinds.items()]))
    drawn = html.table([("", ""), *map(_kind, kinds)], rows, marks=["", *parts])
    text = "Medians over the logged updates; one scale for all. What lies between the parts is called other."
    return html.section("Where an update's time goes", html.paragraph(text), html.stacks(bars), drawn)


def _kind(name: str) -> tuple[str, str]:
    """ "Stage 2, student" -> "Stage 2", "student" """
    stage, _, which = name.partition(", ")
    return stage, which


def _milliseconds(value: float | None, whole: float = 0.0) -> str:
    if value is None:
        return "–"
    return html.brief(value / 1000) + (f" · {value / whole:.0%}" if whole else "")


def _cost(report: Report) -> str:
    total = sum(report.seconds.values())
    rows = [(part, html.duration(s), s / total if total else 0.0) for part, s in report.seconds.items()]
    facts = f"{html.duration(total)} of training and evaluation" if rows else ""
    if report.peak_memory:
        facts += f"{', at' if facts else 'At'} most {html.memory(report.peak_memory)} of memory"
    return html.section("Time and memory", html.paragraph(facts + ".") if facts else "", html.shares(rows))


def _record(report: Report) -> str:
    return html.section(
        "To make it again",
        html.code(report.command),
        html.listing(report.environment),
        html.code(report.recipe),
    )


def _drawable(curve: Curve) -> bool:
    """A log axis has no place for zero."""
    return any(y > 0 or not curve.log_y for line in curve.lines.values() for _, y in line)
