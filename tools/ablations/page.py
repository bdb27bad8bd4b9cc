"""What the ablations found: figures as JSON, a page, a grid of pictures, curves, and a table for the README."""

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import torch
from PIL import Image

from sprint.base.files import write_whole
from sprint.evaluate.metrics.real_scenes import REFERENCE_SCENES
from sprint.lab.series import held_out_scenes
from sprint.pages import html
from sprint.pages.chart import line_chart
from sprint.pages.grid import picture_grid
from sprint.pages.pictures import Cell, PictureRow, picture_rows
from sprint.recipe.load import load_recipe
from tools.ablations import curve
from tools.ablations.answers import (
    PROMPTS,
    Answer,
    Line,
    collect,
    read_result,
)
from tools.ablations.jobs import Settings, feature_network, recipe_file
from tools.ablations.rows import (
    AGREES,
    DISAGREES,
    NAMES,
    RULE,
    WITHIN_NOISE,
    Group,
    Measured,
)
from tools.ablations.starts import STYLE
from tools.bench.measure import environment

NOT_RECORDED = "not recorded"  # of what results of earlier versions do not tell
GRID_COLOURS = 128  # of the committed grid, which has to be small
MOST_LINES = 3  # that a chart can tell apart
FILE = "ablations"
IN_ONE_STEP = "Not in the paper: which changes are better or worse at 1 step."
NOT_ANNEALED = (
    "Points before the end are the same runs on their way, with averaged weights where they have them and a rate that "
    "has not fallen where it is going to. Thread-seconds are those of training on one thread, stage 1, pictures and "
    "the teacher's trajectories among them, without scoring; an update of over three times its kind's median, as the "
    "first is that compiles, counts as the median. Pale lines are seeds."
)


# ---- all that is written ----------------------------------------------------------------------------


def write_results(
    groups: Sequence[Group], settings: Settings, jobs: int, out: Path, page_folder: Path
) -> list[Path]:
    """out/ablations.json, .png, -one-step.png, -gradients.svg and -KEY.svg of groups over thread-seconds;
    page_folder/ablations.html and table.md.  -> the files

    Prints the table and the files. What has no run yet is said to be missing.
    """
    answers = collect(groups, settings)
    here = environment() | ({"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})
    record = {"environment": here, "jobs": jobs} | as_data(answers, settings)
    text = table(answers)
    files = [
        write_whole(out / f"{FILE}.json", json.dumps(record, indent=1, allow_nan=False) + "\n"),
        write_whole(page_folder / f"{FILE}.html", page(answers, record)),
        write_whole(page_folder / "table.md", text + "\n"),
    ]
    for steps, name in (("2", FILE), ("1", f"{FILE}-one-step")):
        if (sheet := grid(answers, steps)) is not None:
            png = io.BytesIO()
            sheet.save(png, "PNG", optimize=True)
            files.append(write_whole(out / f"{name}.png", png.getvalue()))
    if drawing := gradients(answers):
        files.append(write_whole(out / f"{FILE}-gradients.svg", drawing))
    for answer in answers:
        if drawing := curve.drawing(answer):
            files.append(write_whole(out / f"{FILE}-{answer.group.key}.svg", drawing))
    print(text, *files, sep="\n")
    return files


def as_data(answers: Sequence[Answer], settings: Settings) -> dict:
    """Every figure as plain data."""
    names = dict.fromkeys(line.row.recipe for answer in answers for line in answer.lines)
    recipes = {name: load_recipe(recipe_file(name), settings.shared) for name in names}
    bases = (answer.base.row for answer in answers)
    teachers = (read_result(settings.teacher(row), settings.root) for row in bases)
    teacher = next(filter(None, teachers), None)
    found = _all_results(answers, settings)
    return {
        "quick": settings.quick,
        "overrides": list(settings.overrides),
        "recipes": {
            name: {
                "steps": recipe.distill.steps,
                "batch_size": recipe.distill.batch_size,
                "prompts": recipe.evaluate.prompts,
            }
            for name, recipe in recipes.items()
        },
        "fid": f"against {REFERENCE_SCENES} real scenes, {feature_network()}",
        "rule": RULE,
        "thread_seconds": round(sum(result["seconds"] for result in found), 1),
        "made_by": dict(Counter(map(made_by, found))),
        "teacher": teacher and teacher["scores"],
        "groups": [
            {
                "key": answer.group.key,
                "title": answer.group.title,
                "claim": answer.group.claim,
                "compared_at_steps": answer.group.steps,
                "ours": answer.group.ours,
                "rows": [_row_data(answer, line) for line in answer.lines],
            }
            for answer in answers
        ],
    }


def _all_results(answers: Sequence[Answer], settings: Settings) -> list[dict]:
    """Of every run once, those of stage 1 among them."""
    lines = [line for answer in answers for line in answer.lines]
    found = {
        folder: result for line in lines for folder, result in zip(line.folders, line.results, strict=True)
    }
    stages = [settings.teacher(line.row) for line in lines if not line.row.sparse]
    found |= {settings.root / job.key: read_result(job, settings.root) for job in stages}
    return [result for result in found.values() if result]


def made_by(result: Mapping) -> str:
    """What a run's figures depend on beside its recipe, in words."""
    here, network = result.get("made_by"), result.get("network", f"feature network {NOT_RECORDED}")
    if here is None:
        return f"commit, versions and device {NOT_RECORDED}; {network}"
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    return f"commit {here['commit']}; {versions}; {here['device']}; {network}"


def _row_data(answer: Answer, line: Line) -> dict:
    row = line.row
    steps = sorted({count for found in line.scored for count in found["scores"]})
    return {
        "label": row.label,
        "note": row.note,
        "overrides": list(row.overrides),
        "paper": row.paper and {"fid": row.paper.fid, "clip": row.paper.clip},
        "means": {count: _means(line.measured(count)) for count in steps},
        "verdicts": answer.verdicts(line),
        "outcome": answer.outcome(line),
        "recipe": row.recipe,
        "thread_seconds": curve.mean_cost(line),
        "moments": curve.as_data(line) if row.points else [],
        "runs": [
            found and {key: found[key] for key in ("key", "seed", "failed", "scores", "norms", "seconds")}
            for found in line.results
        ],
    }


def _means(measured: Mapping[str, Measured]) -> dict:
    return {
        name: {"mean": m.mean, "spread": m.spread} for name, m in measured.items() if name in ("fid", "score")
    }


# ---- as tables --------------------------------------------------------------------------------------

HEAD = (
    ("", ""),
    ("outcome", "against the base"),
    ("the paper", "FID / CLIP"),
    ("scene score", "2 steps"),
    ("FID", "2 steps"),
    ("score", "1 step"),
    ("FID", "1 step"),
    ("score", "4 steps"),
    ("FID", "4 steps"),
    ("gradient norm", "median"),
    ("training", "thread-seconds"),
)


def cells(answer: Answer, line: Line) -> list[str]:
    """What stands behind a row's name, under `HEAD`."""
    at = {steps: line.measured(steps) for steps in ("1", "2", "4")}
    order = [(measure, steps) for steps in ("2", "1", "4") for measure in ("score", "fid")]
    paper, norm = line.row.paper, at["2"].get("norm")
    return [
        answer.outcome(line),
        f"{paper.fid:.2f} / {paper.clip:.2f}" if paper else "–",
        *(mean_and_spread(at[steps].get(measure)) for measure, steps in order),
        html.number(10**norm.mean if norm else None, ".3g"),
        html.number(curve.mean_cost(line), ".0f"),
    ]


def mean_and_spread(found: Measured | None) -> str:
    if found is None:
        return "–"
    return f"{found.mean:.3f}" + (f" ± {found.spread:.3f}" if found.spread is not None else "")


def table(answers: Sequence[Answer]) -> str:
    """Markdown, as the README has it: without FID at 4 steps."""
    keep = [n for n, titles in enumerate(HEAD) if titles != ("FID", "4 steps")]
    head = [", ".join(filter(None, HEAD[n])) for n in keep]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for answer in answers:
        lines.append(f"| **{answer.group.title}** |" + " |" * (len(head) - 1))
        for line in answer.lines:
            row = [line.row.label, *cells(answer, line)]
            lines.append("| " + " | ".join(row[n] for n in keep) + " |")
    for answer in answers:
        if rows := curve.as_rows(answer):
            titles = [", ".join(filter(None, title)) for title in curve.head(answer)]
            lines += ["", "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
            lines += ["| " + " | ".join([name, *found]) + " |" for name, found in rows]
            lines += ["", *in_sentences(answer)]
    if noise := within_the_noise(answers):
        lines += ["", noise]
    return "\n".join(lines)


def in_sentences(answer: Answer) -> list[str]:
    """What the curve of a group says."""
    return [*filter(None, (*curve.verdict_lines(answer), curve.cheapest(answer)))]


def within_the_noise(answers: Sequence[Answer]) -> str:
    """Which comparisons with the paper are; "" for none."""
    stayed = [
        f"{answer.group.title}, {line.row.label} ({' and '.join(measures)})"
        for answer in answers
        if not answer.group.ours
        for line in answer.lines
        if (measures := [NAMES[m] for m, word in answer.verdicts(line).items() if word == WITHIN_NOISE])
    ]
    return f"Of the comparisons with the paper within the noise: {'; '.join(stayed)}." if stayed else ""


# ---- the page ---------------------------------------------------------------------------------------


def page(answers: Sequence[Answer], record: dict) -> str:
    """One self-contained file."""
    here = record["environment"]
    facts = {
        "Runs": "; ".join(
            f"{name}: {each['steps']} updates of {each['batch_size']} samples, {each['prompts']} held-out prompts"
            for name, each in record["recipes"].items()
        ),
        "Scores": "mean ± standard deviation over seeds",
        "FID": record["fid"],
        "Seeds": "change noise and times; teacher, pictures and prompts are the same for all",
        "Device": f"{here['device']} ({here['cpu']}), {record['jobs']} runs at once",
        "Time": f"{html.duration(record['thread_seconds'])} of all runs together, stages 1 among them",
        "Versions of this page": ", ".join(f"{name} {version}" for name, version in here["versions"].items()),
        "Commit of this page": here["commit"],
        "Runs made by": "; ".join(f"{count}: {by}" for by, count in record["made_by"].items()) or "none yet",
    }
    lead = (
        "On the built-in tiny family: what is added to the paper's recipe, by one-step score against training time, "
        "and the paper's own ablations."
    )
    sections = [
        html.masthead("Ablations", "What each part of the recipe does", lead),
        _summary(answers, record),
        *(_section(answer) for answer in answers),
        html.section("How the rows are compared", html.paragraph(RULE)),
        html.section("The record", html.listing(facts), html.code(here["command"])),
    ]
    return html.page("sprint: ablations", sections)


def _summary(answers: Sequence[Answer], record: dict) -> str:
    counts = Counter(word for answer in answers for line in answer.lines for word in answer.words(line))
    total = counts.total()
    figures = [(f"{counts[word]}", word, f"of {total}") for word in (AGREES, DISAGREES, WITHIN_NOISE)]
    teacher = record["teacher"] or {}
    figures += [
        (f"{found['score']:.3f}", "teacher's scene score", f"{steps} steps, FID {found['fid']:.3f}")
        for steps, found in teacher.items()
    ]
    noise = within_the_noise(answers)
    return html.figures(figures) + (html.paragraph(noise) if noise else "")


def _section(answer: Answer) -> str:
    notes = [f"{line.row.label}: {line.row.note}." for line in answer.lines if line.row.note]
    stopped = [f"{line.row.label}: {failure}" for line in answer.lines for failure in line.failures]
    rows = [(line.row.label, cells(answer, line)) for line in answer.lines]
    steps = answer.group.steps
    shown = [(line, pictures) for line in answer.lines if (pictures := line.pictures(steps)) is not None]
    captions = [scene.caption for scene in held_out_scenes(PROMPTS)]
    columns = [pictures for _, pictures in shown]
    count = min(map(len, columns), default=0)
    titles = [(line.row.label, html.steps(int(steps))) for line, _ in shown]
    rows_of_pictures = (PictureRow(captions[i], "", [Cell(c[i]) for c in columns]) for i in range(count))
    drawn, _ = picture_rows(titles, rows_of_pictures)
    return html.section(
        answer.group.title,
        html.paragraph(f"The paper: {answer.group.claim}" if answer.group.claim else IN_ONE_STEP),
        *_curve(answer),
        html.table(HEAD, rows),
        *(html.paragraph(text, "aside") for text in (*notes, *stopped)),
        drawn if shown else "",
        html.charts(_charts(answer)),
    )


def _curve(answer: Answer) -> list[str]:
    """The picture over thread-seconds, its table and what it says; nothing without runs."""
    if not (drawing := curve.drawing(answer)):
        return []
    sentences = [html.paragraph(sentence) for sentence in in_sentences(answer)]
    table = html.table(curve.head(answer), curve.as_rows(answer))
    return [f"<figure>{drawing}</figure>", html.paragraph(NOT_ANNEALED, "aside"), table, *sentences]


def _charts(answer: Answer) -> list[str]:
    if len(answer.lines) > MOST_LINES:
        return []
    drawn = []
    for metric, title in (("grad_norm", "Gradient norm of the student"), ("tangent_norm", "Tangent norm")):
        lines = {line.row.label: line.curve(metric) for line in answer.lines}
        lines = {name: points for name, points in lines.items() if any(y > 0 for _, y in points)}
        if lines:
            drawn.append(html.chart(title, lines, "step", "norm", log_y=True, note="First seed."))
    return drawn


# ---- small figures for the repository ---------------------------------------------------------------


def grid(answers: Sequence[Answer], steps: str) -> Image.Image | None:
    """A row for each prompt, a column for each row of the groups compared at so many steps, the base once.

    -> None where nothing was drawn
    """
    titles, columns = [], []
    for answer in answers:
        for line in answer.lines if answer.group.steps == steps else ():
            base = line.row.is_base
            title = ("base", html.steps(int(steps))) if base else (line.row.label, answer.group.key)
            pictures = line.pictures(steps)
            if title in titles or pictures is None:
                continue
            titles.insert(0 if base else len(titles), title)
            columns.insert(0 if base else len(columns), pictures)
    if not columns:
        return None
    count = min(map(len, columns))
    captions = [scene.caption for scene in held_out_scenes(count)]
    return picture_grid(titles, captions, [c[:count] for c in columns]).quantize(GRID_COLOURS)


def gradients(answers: Sequence[Answer]) -> str:
    """Gradient and tangent norm of dense and sparse time and of no QK-norm, as an SVG file; "" without runs."""
    wanted = {"time": "{} time", "qk-norm": "QK-norm {}"}
    named: dict[str, Line] = {}
    for answer in answers:
        for line in answer.lines:
            if answer.group.key in wanted and (not line.row.is_base or answer.group.key == "time"):
                named[wanted[answer.group.key].format(line.row.label)] = line
    named = dict(sorted(named.items(), key=lambda item: not item[1].row.is_base))
    panels, keys = [], []
    for metric, label in (("grad_norm", "gradient norm"), ("tangent_norm", "tangent norm")):
        lines = {name: points for name, line in named.items() if (points := line.curve(metric))}
        if not lines:
            return ""
        drawing = line_chart(lines, "step", label, log_y=True)
        panels.append(drawing.replace("<svg ", f'<svg y="{32 + 290 * len(panels)}" height="280" ', 1))
        keys = list(lines)
    key = "".join(
        f'<line class="line-{n}" x1="{58 + 145 * n}" x2="{82 + 145 * n}" y1="16" y2="16"/>'
        f'<text x="{90 + 145 * n}" y="20">{escape(name)}</text>'
        for n, name in enumerate(keys)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 520 606" width="780">'
        f"<style>{STYLE}</style>{key}{''.join(panels)}</svg>\n"
    )
