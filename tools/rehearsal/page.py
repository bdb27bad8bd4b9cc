"""The rehearsal's page."""

from pathlib import Path

from sprint.pages import html
from sprint.pages.pictures import Cell, PictureRow, picture_rows
from sprint.pages.png import read_png
from tools.rehearsal.parts import DRAWN
from tools.rehearsal.plain import PROMPT

LEAD = (
    "Everything of a distillation once, at its real size. The weights of teacher and encoders are random, so pictures "
    "are noise and losses mean nothing. What shows: every part runs, diffusers opens the student, and what it costs."
)
TITLES = {"adapt": "stage 1", "distill": "stage 2"}
HEAD = (
    ("", ""),
    ("time", "wall clock"),
    ("CPU", "all threads"),
    ("memory", "highest, resident"),
    ("the plan", "without libraries"),
    ("off", "libraries taken off"),
)
NOTES = (
    "The plan counts what a stage's updates hold, and no libraries: what those hold is measured by the part “plan”, "
    "which does nothing else, and is taken off before a stage is compared. The plan says nothing of time, nor of the "
    "parts around the stages. A part that took less CPU than its time had to wait for others on this machine.",
    "Stage 1's memory is the highest until its teacher was written; stage 2's the highest of the whole run. Freed "
    "memory that a CPU run keeps for its next tensor counts as held. On a GPU the memory is the host's, and stage 2 is "
    "compared by what PyTorch's allocator handed out there.",
)


def page(record: dict, folder: Path) -> str:
    """One self-contained file, from the record and the pictures in `folder`."""
    sections = [
        html.masthead("Rehearsal", f"{record['recipe']}, the evening before", LEAD),
        html.figures(_figures(record)),
        html.section("What each part took", html.table(HEAD, _rows(record)), *map(html.paragraph, NOTES)),
        html.section("Drawn by diffusers alone", html.paragraph(_drawn(record)), _pictures(record, folder)),
        html.section("The commands", html.code("\n".join(record["commands"]))),
        html.section("The machine", html.listing(_machine(record))),
    ]
    return html.page(f"sprint: rehearsal of {record['recipe']}", sections)


def _figures(record: dict) -> list[tuple[str, str, str]]:
    figures = [
        (html.duration(record["seconds"]), "all parts", f"{html.duration(record['cpu_seconds'])} of CPU"),
        (html.memory(record["peak_memory"]), "at most", "of any process"),
    ]
    figures += [
        (
            html.number(found["off"], "+.0%"),
            f"{TITLES[name]} off the plan",
            html.memory(found["planned_memory"]),
        )
        for name, found in record["stages"].items()
    ]
    return figures


def _rows(record: dict) -> list[tuple[str, list[str]]]:
    rows = []
    for name, part in record["parts"].items():
        cells = [html.duration(part["seconds"]), html.duration(part["cpu_seconds"]), _memory(part), "–", "–"]
        rows.append((f"{name}: {part['what']}", cells))
        for stage, took in part.get("stages", {}).items():
            beside = record["stages"][stage]
            cells = [html.duration(took["seconds"]), "–", _memory(took)]
            cells += [html.memory(beside["planned_memory"]), html.number(beside["off"], "+.0%")]
            rows.append((TITLES[stage], cells))
    return rows


def _memory(found: dict) -> str:
    return html.memory(found["peak_memory"]) if found["peak_memory"] else "–"


def _drawn(record: dict) -> str:
    drawn = record["drawn"]
    seconds = ", ".join(
        f"{html.steps(int(steps))} in {html.brief(found['seconds'])}"
        for steps, found in drawn["pictures"].items()
    )
    alone = "sprint was imported" if drawn["sprint_was_imported"] else "nothing of sprint was imported"
    return f"Opened in {html.brief(drawn['seconds_to_open'])}; {seconds}; {alone}. Noise, since the weights are random."


def _pictures(record: dict, folder: Path) -> str:
    steps = list(record["drawn"]["pictures"])
    cells = [Cell(read_png(folder / DRAWN / f"{count}.png"), words="random weights") for count in steps]
    drawn, _ = picture_rows([(html.steps(int(n)), "") for n in steps], [PictureRow(PROMPT, "seed 0", cells)])
    return drawn


def _machine(record: dict) -> dict[str, str]:
    here = record["machine"]
    return {
        "Machine": here["machine"],
        "Versions": ", ".join(f"{name} {version}" for name, version in here["versions"].items()),
        "Disk": f"{html.memory(record['disk'])} at the end; at most {html.memory(record['planned_disk'])} by the plan",
    }
