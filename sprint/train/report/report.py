"""The page people look at: what a run is (`Report`), and `write_report`, which sets it.

Three files in the run's folder: report.html (self-contained), samples.png (the picture grid) and
report.json (the same without pictures). Whatever was not measured is None or empty and is left out.
"""

import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np

from sprint.base.files import write_whole
from sprint.pages import html
from sprint.pages.grid import picture_grid
from sprint.train.report.curves import Curve, in_order

CATEGORY_TITLES = {"two_object": "Two objects", "color_attr": "Attribute binding"}  # GenEval's short names


class Role(str, Enum):
    teacher = "teacher"  # adapted, with guidance; what the student is held against
    undistilled = "undistilled"  # the same weights at the student's steps
    student = "student"


@dataclass(frozen=True)
class Scores:
    """Shares of prompts whose picture holds what they say, 0 to 1; categories by name."""

    overall: float
    categories: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """One way of sampling: a set of weights and a number of steps."""

    role: Role
    steps: int
    seconds_per_picture: float | None = None
    scores: Scores | None = None
    fid: float | None = None
    pictures: Sequence[np.ndarray] = ()  # uint8 [H, W, 3], one for each caption of the report, or none

    @property
    def key(self) -> str:
        return f"{self.role.value}_{self.steps}"

    @property
    def titles(self) -> tuple[str, str]:
        return self.role.value.capitalize(), html.steps(self.steps)


@dataclass(frozen=True)
class Goal:
    """What was wanted and what came out, in words, and whether it is enough."""

    text: str
    goal: str
    value: str
    met: bool


@dataclass(frozen=True)
class Report:
    name: str  # of the recipe
    columns: Sequence[Column] = ()  # in reading order: teacher, undistilled, student 1, 2, 3, 4
    captions: Sequence[str] = ()  # of the pictures; the same seed along a row
    prompts: int | None = None  # behind scores and FID
    fid_space: str = ""  # whose features FID compares, "the scene network's features" say
    goals: Sequence[Goal] = ()
    curves: Sequence[Curve] = ()
    update_times: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # kind of update: part: ms
    seconds: Mapping[str, float] = field(default_factory=dict)  # by part of the run, in order
    peak_memory: int | None = None  # bytes
    recipe: str = ""  # resolved, as YAML
    command: str = ""  # that makes this run again
    environment: Mapping[str, str] = field(default_factory=dict)  # {"torch": "2.11.0", "CPU": "…"}
    notes: Sequence[str] = ()  # whatever a reader must know; set under the headline

    def find(self, role: Role, steps: int | None = None) -> Column | None:
        """The first column of this role, at these steps if given."""
        matches = (c for c in self.columns if c.role == role and steps in (None, c.steps))
        return next(matches, None)


# ---- writing ----------------------------------------------------------------------------------------


def write_report(folder: Path, report: Report) -> Path:
    """Write report.html, report.json and, where there are pictures, samples.png.  -> path of the page

    Raises ValueError for a column whose pictures are not one for each caption.
    """
    folder = Path(folder)
    for column in report.columns:
        if len(column.pictures) not in (0, len(report.captions)):
            raise ValueError(
                f"{column.key}: {len(column.pictures)} pictures for {len(report.captions)} captions"
            )
    shown = _with_pictures(report)
    if shown:
        grid = picture_grid([c.titles for c in shown], report.captions, [c.pictures for c in shown])
        data = io.BytesIO()
        grid.save(data, "PNG", optimize=True)
        write_whole(folder / "samples.png", data.getvalue())
    write_whole(folder / "report.json", json.dumps(report_data(report), indent=2) + "\n")
    return write_whole(folder / "report.html", report_html(report))


def report_data(report: Report) -> dict:
    """The report as plain data, without pictures; numbers that are not finite become null."""
    bare = [dataclasses.replace(column, pictures=()) for column in report.columns]
    data = dataclasses.asdict(dataclasses.replace(report, columns=bare))
    for column, plain in zip(bare, data["columns"], strict=True):
        del plain["pictures"]
        plain["key"] = column.key
    return _plain(data)


def report_html(report: Report) -> str:
    """The whole page as text."""
    return html.page(
        f"{report.name} · sprint report",
        [
            html.masthead("Sprint · distillation report", report.name, headline(report)),
            *(html.paragraph(note, "note") for note in report.notes),
            html.figures(_key_figures(report)),
            _pictures(report),
            _scores(report),
            _curves(report),
            _update_times(report),
            _cost(report),
            _record(report),
        ],
    )


# ---- what it says -----------------------------------------------------------------------------------


def headline(report: Report) -> str:
    """The run in two sentences, of what was measured only."""
    students = [c for c in report.columns if c.role == Role.student]
    if not students:
        return "Trained; no pictures were drawn."
    fewest = min(students, key=lambda column: column.steps)
    most = max(students, key=lambda column: column.steps)
    span = f"{fewest.steps} to {most.steps} steps" if most.steps > fewest.steps else fewest.titles[1]
    text = f"One set of weights, {span}"
    if fewest.seconds_per_picture:
        text += f": {fewest.titles[1]} takes {html.brief(fewest.seconds_per_picture)} a picture"
    score = _ratio(_overall(fewest), _overall(report.find(Role.teacher)))
    if score is not None:
        teacher = report.find(Role.teacher)
        text += f" and keeps {score:.0%} of the scene score of the {teacher.steps}-step teacher"
    short = sum(not goal.met for goal in report.goals)
    if not report.goals:
        return text + "."
    verdict = f"{short} of {len(report.goals)} goals fall short" if short else "Every goal is met"
    return f"{text}. {verdict}."


def distillation_goals(report: Report) -> list[Goal]:
    """The thresholds of a tiny distillation against its adapted teacher; those not measured are left out.

    FID at most 1.2 × the teacher's at 1 step and 1.5 × at 2 to 4; colours and counting at least 0.85 × at
    1 step and 0.9 × at 4; overall scene score at least the teacher's at 1 step and 0.75 × at 4.
    """
    teacher = report.find(Role.teacher)
    goals = []
    for steps, most in ((1, 1.2), (2, 1.5), (3, 1.5), (4, 1.5)):
        ratio = _ratio(_fid(report.find(Role.student, steps)), _fid(teacher))
        goals.append(_ratio_goal(f"FID ÷ teacher's, {html.steps(steps)}", ratio, most, at_most=True))
    for name, at_1, at_4 in (("colors", 0.85, 0.9), ("counting", 0.85, 0.9), ("overall", 1.0, 0.75)):
        for steps, least in ((1, at_1), (4, at_4)):
            ratio = _ratio(_score(report.find(Role.student, steps), name), _score(teacher, name))
            text = f"{_category(name)} ÷ teacher's, {html.steps(steps)}"
            goals.append(_ratio_goal(text, ratio, least, at_most=False))
    return [goal for goal in goals if goal is not None]


# ---- sections ---------------------------------------------------------------------------------------


def _key_figures(report: Report) -> list[tuple[str, str, str]]:
    teacher, student = report.find(Role.teacher), report.find(Role.student)
    figures = []
    if student and student.seconds_per_picture:
        speed = _ratio(_pace(teacher), student.seconds_per_picture)
        beside = f"{speed:.0f}× as fast as the teacher" if speed else ""
        figures.append((html.brief(student.seconds_per_picture), f"a picture, {student.titles[1]}", beside))
    if _overall(student) is not None:
        beside = f"teacher {_overall(teacher):.2f}" if _overall(teacher) is not None else ""
        figures.append((f"{_overall(student):.2f}", f"scene score, {student.titles[1]}", beside))
    if _fid(student) is not None:
        beside = f"teacher {_fid(teacher):.2f}" if _fid(teacher) is not None else ""
        figures.append((f"{_fid(student):.2f}", f"FID, {student.titles[1]}", beside))
    if report.seconds:
        memory = f"at most {html.memory(report.peak_memory)} of memory" if report.peak_memory else ""
        figures.append((html.duration(sum(report.seconds.values())), "training and evaluation", memory))
    return figures


def _pictures(report: Report) -> str:
    shown = _with_pictures(report)
    if not shown:
        return ""
    text = "Each row is one prompt and one seed; each column is one way to sample it."
    if report.find(Role.undistilled):
        text += " Undistilled is the adapted teacher asked to do what the student does."
    grid = html.picture_table([c.titles for c in shown], report.captions, [c.pictures for c in shown])
    return html.section("Pictures", html.paragraph(text), grid)


def _scores(report: Report) -> str:
    """The table of everything measured, one column a way of sampling, and the goals."""
    columns = [c for c in report.columns if c.scores or c.fid is not None or c.seconds_per_picture]
    goals = html.checklist([(g.text, g.goal, g.value, g.met) for g in report.goals])
    if not columns:
        return html.section("Scores", goals)
    names = dict.fromkeys(["overall", *(n for c in columns if c.scores for n in c.scores.categories)])
    reference = report.find(Role.teacher)
    shares = [[_score(c, name) for c in columns] for name in names]
    fid = [_ratio(c.fid, _fid(reference)) for c in columns]
    speed = [_ratio(_pace(reference), c.seconds_per_picture) for c in columns]
    rows = [(_category(n), [html.number(v) for v in row]) for n, row in zip(names, shares, strict=True)]
    rows += [
        ("FID", [html.number(c.fid) for c in columns]),
        ("FID ÷ teacher's", [html.number(v) for v in fid]),
        ("Time a picture", [html.brief(c.seconds_per_picture) for c in columns]),
        ("Speed ÷ teacher's", [html.number(v, ".1f") for v in speed]),
    ]
    bars = shares + [[None] * len(columns)] * 4
    kept = [i for i, (_, cells) in enumerate(rows) if set(cells) != {"–"}]
    head = [("", ""), *(c.titles for c in columns)]
    drawn = html.table(head, [rows[i] for i in kept], [bars[i] for i in kept])
    return html.section("Scores", html.paragraph(_what_scores_are(report)), drawn, goals)


def _what_scores_are(report: Report) -> str:
    text = ""
    if any(column.scores for column in report.columns):
        text += "A scene score is the share of prompts whose picture shows what the prompt says. "
    if any(column.fid is not None for column in report.columns):
        space = f" between {report.fid_space}" if report.fid_space else ""
        text += f"FID is a distance{space}: lower is better. "
    if report.prompts:
        text += f"All on {report.prompts} held-out prompts."
    return text.strip() or "What was measured."


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


# ---- numbers ----------------------------------------------------------------------------------------


def _with_pictures(report: Report) -> list[Column]:
    return [column for column in report.columns if len(column.pictures)]


def _score(column: Column | None, name: str) -> float | None:
    if column is None or column.scores is None:
        return None
    return column.scores.overall if name == "overall" else column.scores.categories.get(name)


def _overall(column: Column | None) -> float | None:
    return _score(column, "overall")


def _fid(column: Column | None) -> float | None:
    return None if column is None else column.fid


def _pace(column: Column | None) -> float | None:
    return None if column is None else column.seconds_per_picture


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


def _ratio_goal(text: str, ratio: float | None, bound: float, at_most: bool) -> Goal | None:
    if ratio is None:
        return None
    sign = "≤" if at_most else "≥"
    met = ratio <= bound if at_most else ratio >= bound
    return Goal(text, f"{sign} {bound:g}", f"{ratio:.3f}", met)


def _drawable(curve: Curve) -> bool:
    """A log axis has no place for zero."""
    return any(y > 0 or not curve.log_y for line in curve.lines.values() for _, y in line)


def _category(name: str) -> str:
    return CATEGORY_TITLES.get(name, name.replace("_", " ").capitalize())


def _plain(value):
    """JSON has no NaN: null instead, at any depth."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
