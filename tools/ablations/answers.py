"""The rows of `tools/ablations/rows.py` with what their runs found, and what follows from it in words."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sprint.pages import html
from sprint.pages.chart import Point
from sprint.train.distill import GENERATOR, DistillStage
from sprint.train.log import METRICS, read_metrics
from tools.ablations.jobs import RESULT, Job, Settings, is_done
from tools.ablations.rows import (
    AGREES,
    BETTER,
    DISAGREES,
    NOT_COMPARABLE,
    WORSE,
    Group,
    Measured,
    Row,
    expectations,
    in_words,
    verdicts,
)
from tools.ablations.run import PICTURES

PROMPTS = 6  # of the pictures that are shown: one of each category
HOPED = {"fid": -1, "score": 1}  # of a change that is ours
IN_OUR_WORDS = {AGREES: BETTER, DISAGREES: WORSE}


@dataclass(frozen=True)
class Line:
    """A row with what its runs found, seed by seed. A run that is not there is None."""

    row: Row
    folders: tuple[Path, ...]
    results: tuple[dict | None, ...]

    @property
    def scored(self) -> list[dict]:
        return [found for found in self.results if found and found["scores"]]

    @property
    def failures(self) -> list[str]:
        return [found["failed"] for found in self.results if found and found["failed"]]

    def measured(self, steps: str) -> dict[str, Measured]:
        """By measure; "norm" is the logarithm of the median gradient norm. What no run has is left out."""
        there = {seed: found for seed, found in enumerate(self.results) if found}
        scores = {k: found["scores"][steps] for k, found in there.items() if steps in found["scores"]}
        norms = {k: found["norms"] for k, found in there.items() if found["norms"]["grad_norm"]}
        measured = {}
        if norms:
            logs = {k: math.log10(norm["grad_norm"]) for k, norm in norms.items()}
            measured["norm"] = Measured(logs, {k: norm["grad_norm_decades"] for k, norm in norms.items()})
        for measure in ("fid", "score") if scores else ():
            values = {k: found[measure] for k, found in scores.items()}
            measured[measure] = Measured(values, {k: s[f"{measure}_error"] for k, s in scores.items()})
        return measured

    def pictures(self, steps: str) -> np.ndarray | None:
        """Of the first run that has any: uint8 [N, H, W, 3]."""
        files = [folder / PICTURES for folder in self.folders if (folder / PICTURES).exists()]
        if not files:
            return None
        with np.load(files[0], allow_pickle=False) as saved:
            return saved[steps][:PROMPTS] if steps in saved else None

    def curve(self, metric: str) -> list[Point]:
        """(step, value) of the student's logged updates, first seed."""
        rows = read_metrics(self.folders[0] / METRICS)
        student = [row for row in rows if row["stage"] == DistillStage.name and row["phase"] == GENERATOR]
        return [(row["step"], row[metric]) for row in student if row.get(metric) is not None]


@dataclass(frozen=True)
class Answer:
    """A group, its lines, and the line of its base."""

    group: Group
    lines: tuple[Line, ...]

    @property
    def base(self) -> Line:
        return next(line for line in self.lines if line.row.is_base)

    def verdicts(self, line: Line) -> dict[str, str]:
        """By measure: whether the paper is right, or whether what is ours is better."""
        group = self.group
        ours = {} if line.row.is_base else HOPED
        expected = ours if group.ours else expectations(line.row, group.base)
        found = verdicts(expected, line.measured(group.steps), self.base.measured(group.steps))
        return {m: IN_OUR_WORDS.get(word, word) for m, word in found.items()} if group.ours else found

    def words(self, line: Line) -> list[str]:
        """Every verdict on the paper that `outcome` tells; runs that stopped agree where the paper expects it."""
        on_paper = [] if self.group.ours else [*self.verdicts(line).values()]
        return [AGREES] * self._stopped_as_expected(line) + on_paper

    def outcome(self, line: Line) -> str:
        """In plain words."""
        row, parts = line.row, []
        if not any(line.results):
            return "not run"
        if row.is_base:
            return "base"
        if line.failures:
            expected = f": {AGREES}" if self._stopped_as_expected(line) else ""
            parts.append(f"{len(line.failures)} of {len(line.results)} runs stopped{expected}")
        if found := self.verdicts(line):
            parts.append(in_words(found))
        elif not row.comparable:
            parts.append(NOT_COMPARABLE)
        elif not line.failures:
            asked = self.group.ours or expectations(row, self.group.base)
            missing = (
                f"not drawn at {html.steps(int(self.group.steps))}"
                if any(self.base.results)
                else "base not run"
            )
            parts.append(missing if asked else "the paper gives no figure")
        return "; ".join(parts)

    def _stopped_as_expected(self, line: Line) -> bool:
        return bool(line.failures) and line.row.comparable and (line.row.worse or line.row.louder)


def collect(groups: Sequence[Group], settings: Settings) -> list[Answer]:
    """Everything that is done."""
    return [Answer(group, tuple(_line(row, settings) for row in group.rows)) for group in groups]


def _line(row: Row, settings: Settings) -> Line:
    jobs = [settings.student(row, seed) for seed in settings.seeds(row)]
    folders = tuple(settings.root / job.key for job in jobs)
    return Line(row, folders, tuple(read_result(job, settings.root) for job in jobs))


def read_result(job: Job, root: Path) -> dict | None:
    """If it is done."""
    return json.loads((root / job.key / RESULT).read_text(encoding="utf-8")) if is_done(job, root) else None
