"""What a run came to: the figures of its evaluation, its goals, and the two sentences that open its page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sprint.evaluate.metrics.registry import FID, PACE, SCENES
from sprint.evaluate.models import STUDENT, TEACHER, UNDISTILLED
from sprint.evaluate.result import Column, Result
from sprint.lab.categories import CATEGORY_TITLES, category_title
from sprint.pages import html

READING_ORDER = (TEACHER, UNDISTILLED, STUDENT)  # roles, from left to right


@dataclass(frozen=True)
class Goal:
    """What was wanted and what came out, in words, and whether it is enough."""

    text: str  # what, ÷ teacher's, and at how many steps
    goal: str
    value: str
    met: bool

    @property
    def what(self) -> str:
        return self.text.partition(" ÷ ")[0]

    @property
    def at(self) -> str:
        return self.text.rpartition(", ")[2]


# ---- columns and their figures ----------------------------------------------------------------------


def in_reading_order(result: Result) -> Result:
    """Teacher, undistilled, student at 1, 2, 3, 4; whatever else there is comes last."""
    places = {role: place for place, role in enumerate(READING_ORDER)}
    ordered = sorted(result.columns, key=lambda c: (places.get(c.role, len(places)), c.steps))
    return replace(result, columns=ordered)


def find(result: Result, role: str, steps: int | None = None) -> Column | None:
    """The first column of this role, at these steps if given."""
    matches = (c for c in result.columns if c.role == role and steps in (None, c.steps))
    return next(matches, None)


def scene_score(column: Column | None, category: str = "") -> float | None:
    """0 to 1, of all prompts or of GenEval's tag."""
    return _value(column, SCENES.name, category.replace("_", " ") or "scene score")


def fid(column: Column | None) -> float | None:
    return _value(column, FID.name, "FID")


def seconds(column: Column | None) -> float | None:
    """What a picture took while it was drawn for the evaluation."""
    milliseconds = _value(column, PACE.name, "drawing, ms a picture")
    return None if milliseconds is None else milliseconds / 1000


def ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


def _value(column: Column | None, metric: str, name: str) -> float | None:
    figure = column and column.figure(metric, name)
    return figure.value if figure and math.isfinite(figure.value) else None


def column_data(column: Column) -> dict:
    """What report.json says of a column."""
    score = scene_score(column)
    categories = {tag: scene_score(column, tag) for tag in CATEGORY_TITLES}
    known = {tag: share for tag, share in categories.items() if share is not None}
    return {
        "role": column.role,
        "steps": column.steps,
        "seconds_per_picture": seconds(column),
        "scores": None if score is None else {"overall": score, "categories": known},
        "fid": fid(column),
        "key": f"{column.role}_{column.steps}",
    }


# ---- goals ------------------------------------------------------------------------------------------


def distillation_goals(result: Result) -> list[Goal]:
    """The thresholds of a tiny distillation against its adapted teacher; those not measured are left out.

    FID at most 1.2 × the teacher's at 1 step and 1.5 × at 2 to 4; colours and counting at least 0.85 × at
    1 step and 0.9 × at 4; overall scene score at least the teacher's at 1 step and 0.75 × at 4.
    """
    teacher = find(result, TEACHER)
    goals = []
    for steps, most in ((1, 1.2), (2, 1.5), (3, 1.5), (4, 1.5)):
        apart = ratio(fid(find(result, STUDENT, steps)), fid(teacher))
        goals.append(_ratio_goal(f"FID ÷ teacher's, {html.steps(steps)}", apart, most, at_most=True))
    for tag, at_1, at_4 in (("colors", 0.85, 0.9), ("counting", 0.85, 0.9), ("", 1.0, 0.75)):
        title = category_title(tag).capitalize() or "Scene score"
        for steps, least in ((1, at_1), (4, at_4)):
            kept = ratio(scene_score(find(result, STUDENT, steps), tag), scene_score(teacher, tag))
            goals.append(_ratio_goal(f"{title} ÷ teacher's, {html.steps(steps)}", kept, least, at_most=False))
    return [goal for goal in goals if goal is not None]


def _ratio_goal(text: str, value: float | None, bound: float, at_most: bool) -> Goal | None:
    if value is None:
        return None
    sign = "≤" if at_most else "≥"
    met = value <= bound if at_most else value >= bound
    return Goal(text, f"{sign} {bound:g}", f"{value:.3f}", met)


# ---- in words ---------------------------------------------------------------------------------------


def best_student(result: Result) -> Column | None:
    """The student's column of the highest scene score, of equal ones the fastest; without scores its last one."""
    students = _students(result)
    scored = [column for column in students if scene_score(column) is not None]
    if scored:
        return max(scored, key=lambda column: (scene_score(column), -column.steps))
    return max(students, key=lambda column: column.steps, default=None)


def headline(result: Result | None, goals: Sequence[Goal]) -> str:
    """What the run is good for, of what was measured only: the best column first, then what falls short."""
    best = best_student(result) if result else None
    if best is None:
        return "Trained; no pictures were drawn."
    return f"{_what_is_kept(result, best)}.{_what_falls_short(goals)}"


def _what_is_kept(result: Result, best: Column) -> str:
    """ "4 steps keep 93% of the 20-step teacher's scene score at 6.7× its speed; 1 step keeps 30%" """
    teacher, fewest = find(result, TEACHER), min(_students(result), key=lambda column: column.steps)
    kept = ratio(scene_score(best), scene_score(teacher))
    if kept is None:
        speed, at = ratio(seconds(teacher), seconds(best)), html.steps(best.steps)
        beside = f", at {at} {speed:.1f}× as fast as its teacher" if speed else ""
        return f"Trained, and drawn{beside}; nothing was scored: judge by the pictures"
    text = f"{_subject(best)} {kept:.0%} of the {teacher.steps}-step teacher's scene score"
    if speed := ratio(seconds(teacher), seconds(best)):
        text += f" at {speed:.1f}× its speed"
    if fewest is not best:
        text += f"; {_subject(fewest)} {ratio(scene_score(fewest), scene_score(teacher)):.0%}"
    return text


def _what_falls_short(goals: Sequence[Goal]) -> str:
    """ " 4 of 8 goals are met; short of them fall FID, colors at 1 step." """
    missed = [goal for goal in goals if not goal.met]
    if not missed:
        return " Every goal is met." if goals else ""
    by_steps: dict[str, list[str]] = {}
    for goal in missed:
        by_steps.setdefault(goal.at, []).append(goal.what)
    short = "; ".join(f"{', '.join(names)} at {at}" for at, names in by_steps.items())
    return f" {len(goals) - len(missed)} of {len(goals)} goals are met; short of them fall {short}."


def _students(result: Result) -> list[Column]:
    return [column for column in result.columns if column.role == STUDENT]


def _subject(column: Column) -> str:
    return f"{html.steps(column.steps)} keep{'s' * (column.steps == 1)}"


def key_figures(result: Result) -> list[tuple[str, str, str]]:
    """Of the best column, beside the teacher's: (number, what it is, beside what)."""
    best, teacher = best_student(result), find(result, TEACHER)
    if best is None:
        return []
    figures, at = [], html.steps(best.steps)
    if (score := scene_score(best)) is not None:
        figures.append((f"{score:.2f}", f"scene score, {at}", _teachers(scene_score(teacher))))
    if (distance := fid(best)) is not None:
        figures.append((f"{distance:.2f}", f"FID, {at}", _teachers(fid(teacher))))
    if took := seconds(best):
        speed = ratio(seconds(teacher), took)
        beside = f"{speed:.1f}× as fast as the teacher" if speed else ""
        figures.append((html.brief(took), f"a picture, {at}{_of_blocks(best, teacher)}", beside))
    return figures


def _of_blocks(student: Column, teacher: Column | None) -> str:
    """ " of 8 blocks", where the teacher has fewer, as far as is known."""
    return f" of {student.depth} blocks" if teacher and student.depth > teacher.depth > 0 else ""


def _teachers(value: float | None) -> str:
    return "" if value is None else f"teacher {value:.2f}"
