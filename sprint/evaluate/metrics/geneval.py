"""GenEval (arXiv 2310.11513): do pictures show the objects, numbers, colours and places of their prompts?

The official protocol: 553 prompts in six categories, four pictures of each, objects by a detector, colours by CLIP,
the rules of `sprint.evaluate.geneval_rules`, and the mean of the categories' shares of correct pictures as the
score. `sprint.evaluate.geneval_models` says where its networks differ from the official program's.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate.metrics.geneval_rules import (
    CLASSES,
    COLORS,
    PICTURES,
    PROMPTS,
    RELATIONS,
    Requirement,
    Task,
    Verdict,
    is_official,
    judge,
    summary,
)
from sprint.evaluate.metrics.metric import BINOMIAL, Choices, Drawn
from sprint.evaluate.metrics.registry import GENEVAL, GENEVAL_ROW
from sprint.evaluate.prompts import GENEVAL as GENEVAL_SET
from sprint.evaluate.prompts import Prompts, spread
from sprint.evaluate.result import Figure, Measured, Shot, Verdicts, share
from sprint.weights.hub import HubError, fetch_file

__all__ = ["GenEval", "Task", "Verdict", "read_metadata", "summary"]

METADATA = "evaluation_metadata.jsonl"
METADATA_ADDRESS = f"https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/{METADATA}"
HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?")  # owner/name or owner/name:file


class GenEval:
    """Judges pictures with a detector and a colour classifier."""

    def __init__(
        self, detector: str | None = None, clip: str | None = None, device: torch.device | str = "cpu"
    ):
        """detector, clip   local folders or hub ids of a Mask2Former for COCO instances and a CLIP; None: GenEval's

        Raises NotHereError, one line for all that could be fetched, and SprintError for what is here and unfit.
        """
        from sprint.evaluate.metrics.geneval_models import MASK2FORMER, VIT_L_14, ColorNamer, Detector

        self.detector_name, self.clip_name = detector or MASK2FORMER, clip or VIT_L_14
        self.detect, self.name_colors = all_here(
            partial(Detector, self.detector_name, device), partial(ColorNamer, self.clip_name, device)
        )

    @property
    def protocol(self) -> str:
        """What stands beside the figure."""
        return (
            f"objects by {self.detector_name} through transformers (the official program runs mmdet's weights), "
            f"colours by {self.clip_name}, float32, official thresholds and rules"
        )

    def __call__(self, pictures: np.ndarray, tasks: Sequence[Task]) -> list[Verdict]:
        """Pictures uint8 [B, H, W, 3] and what each is to show."""
        if len(pictures) != len(tasks):
            raise SprintError(f"GenEval: {len(pictures)} pictures but {len(tasks)} tasks; give one for each")
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
            raise SprintError(
                f"GenEval reads pictures of uint8 [B, H, W, 3], not {pictures.dtype} {list(pictures.shape)}"
            )
        return [
            judge(task, self.detect(picture), partial(self.name_colors, picture))
            for picture, task in zip(pictures, tasks, strict=True)
        ]


def all_here(*makers: Callable[[], Any]) -> list[Any]:
    """What each makes. Raises one NotHereError for all that are not here, so that they can be fetched at once."""
    made, missing = [], []
    for make in makers:
        try:
            made.append(make())
        except NotHereError as error:
            missing.append(str(error))
    if missing:
        raise NotHereError("; ".join(missing))
    return made


# ---- the prompts ------------------------------------------------------------------------------------


def read_metadata(source: str | Path = METADATA) -> list[Task]:
    """GenEval's prompts and what their pictures must show, in the order of the file, official or of the same form.

    source   the .jsonl file, a folder that holds evaluation_metadata.jsonl, or a dataset on the hub as
             OWNER/NAME or OWNER/NAME:FILE
    Raises NotHereError where there is no such file, and SprintError that names the line that is wrong.
    """
    file = _find(str(source))
    try:
        lines = file.read_text(encoding="utf-8").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SprintError(f"{file}: cannot be read as text ({error}); give GenEval's {METADATA}") from error
    if lines == [""]:
        raise SprintError(f"{file}: empty; give GenEval's {METADATA}, from {METADATA_ADDRESS}")
    return [_Line(f"{file}:{number}", line).task() for number, line in enumerate(lines, 1)]


def _find(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        path = path / METADATA
    if path.is_file():
        return path
    hub = HUB_FILE.fullmatch(source)
    if hub and (hub[2] or path.suffix != ".jsonl"):
        return _from_hub(hub[1], hub[2] or METADATA)
    raise NotHereError(
        f"GenEval's prompts, {path}, are not here; fetch them with `curl -O {METADATA_ADDRESS}`"
    )


def _from_hub(dataset: str, name: str) -> Path:
    try:
        return fetch_file(dataset, name, repo_type="dataset")
    except HubError as error:
        raise NotHereError(
            f"GenEval's prompts, {name} of the hub's dataset {dataset}, are not here; fetch them with "
            f"`curl -O {METADATA_ADDRESS}` and give the file ({error})"
        ) from error


class _Line:
    """One line of the file. `where` names it in errors."""

    def __init__(self, where: str, text: str):
        self.where = where
        try:
            self.values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise self.error(f"not JSON ({error})") from error

    def error(self, problem: str) -> SprintError:
        return SprintError(f"{self.where}: {problem}")

    def task(self) -> Task:
        values = self.fields(self.values, "the line", {"tag", "prompt", "include"}, {"exclude"})
        tag = self.one_of(values["tag"], tuple(PROMPTS), "tag")
        prompt = values["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise self.error(f"prompt: {prompt!r}; expected words")
        include = self.requirements(values["include"], "include", {"color", "position"})
        exclude = self.requirements(values["exclude"], "exclude", set()) if "exclude" in values else ()
        return Task(tag, prompt, include, exclude)

    def fields(self, values: Any, what: str, needed: set[str], allowed: set[str]) -> dict:
        if not isinstance(values, dict):
            raise self.error(f"{what}: {values!r}; expected an object in braces")
        if missing := sorted(needed - values.keys()):
            raise self.error(f"{what} has no {missing[0]!r}")
        if unknown := sorted(values.keys() - needed - allowed):
            raise self.error(f"{what} has {unknown[0]!r}, which GenEval's rules do not know")
        return values

    def one_of(self, value: Any, known: Sequence[str], what: str) -> str:
        if value not in known:
            raise self.error(f"{what}: {value!r}; expected one of {', '.join(known)}")
        return value

    def requirements(self, values: Any, what: str, optional: set[str]) -> tuple[Requirement, ...]:
        if not isinstance(values, list) or not values:
            raise self.error(f"{what}: {values!r}; expected a list of objects")
        return tuple(self.requirement(value, f"{what}[{i}]", i, optional) for i, value in enumerate(values))

    def requirement(self, values: Any, what: str, index: int, optional: set[str]) -> Requirement:
        values = self.fields(values, what, {"class", "count"}, optional)
        name = self.one_of(values["class"], CLASSES, f"{what}.class")
        count = values["count"]
        if type(count) is not int or count < 1:
            raise self.error(f"{what}.count: {count!r}; expected a whole number from 1")
        color = self.one_of(values["color"], COLORS, f"{what}.color") if "color" in values else None
        position = (
            self.position(values["position"], f"{what}.position", index) if "position" in values else None
        )
        return Requirement(name, count, color, position)

    def position(self, value: Any, what: str, index: int) -> tuple[str, int]:
        if not isinstance(value, list) or len(value) != 2:
            raise self.error(f"{what}: {value!r}; expected [relation, index of an earlier object]")
        relation, target = value
        self.one_of(relation, RELATIONS, what)
        if type(target) is not int or not 0 <= target < index:
            raise self.error(f"{what}: {target!r}; expected the index of an earlier object of include")
        return relation, target


# ---- the metric --------------------------------------------------------------------------------------


class GenEvalScore:
    """The official protocol: 553 prompts, four pictures of each, an object detector and CLIP for colours."""

    metric, size = GENEVAL, None

    def __init__(self, choices: Choices, prompts: Prompts | NotHereError):
        """prompts   not looked at: it has its own"""
        self.choices = choices

    def find(self) -> Prompts:
        given = self.choices.geneval_metadata
        every = read_metadata(given) if given else read_metadata()
        chosen = spread(len(every), self.choices.count and math.ceil(self.choices.count / PICTURES))
        self.tasks = [every[i] for i in chosen for _ in range(PICTURES)]
        seeds = [self.choices.seed + PICTURES * i + k for i in chosen for k in range(PICTURES)]
        shots = [Shot(task.prompt, seed, task.tag) for task, seed in zip(self.tasks, seeds, strict=True)]
        words = f"{PICTURES} for each of {len(chosen)} prompts of {len(every)}"
        self.prompts = Prompts(GENEVAL_SET, words, shots)
        return self.prompts

    def open(self) -> None:
        choices = self.choices
        self.judge = GenEval(choices.geneval_detector, choices.clip_model, choices.device)

    def protocol(self) -> dict[str, str]:
        return {
            "pictures": self.prompts.words,
            "prompts": self._official(),
            "networks": self.judge.protocol,
            "error": BINOMIAL,
        }

    def _official(self) -> str:
        prompts, tags = len(set(self.tasks)), len({task.tag for task in self.tasks})
        if is_official(self.tasks):
            return f"official {prompts} × {PICTURES}"
        return f"not official: {prompts} prompt{'s' * (prompts != 1)}, {tags} of {len(PROMPTS)} tags"

    def measure(self, drawn: Drawn) -> Measured:
        verdicts = []
        for batch in drawn.batches("GenEval"):
            verdicts += self.judge(batch, self.tasks[len(verdicts) : len(verdicts) + len(batch)])
        found = summary(self.tasks, verdicts)
        tags = {tag: share(row["correct"], row["pictures"]) for tag, row in found["tags"].items()}
        correct, prompts = [verdict.correct for verdict in verdicts], found["by_prompt"]
        figures = {
            "GenEval": self.metric.figure(found["overall"], error_of_mean(list(tags.values()))),
            **{f"{GENEVAL_ROW}{tag.replace('_', ' ')}": figure for tag, figure in tags.items()},
            f"{GENEVAL_ROW}of all pictures": share(sum(correct), len(correct)),
            f"{GENEVAL_ROW}of prompts, one right": share(
                sum(p["correct"] > 0 for p in prompts), len(prompts)
            ),
        }
        return Measured(
            figures, Verdicts(GENEVAL_SET, correct, reasons=[verdict.reason for verdict in verdicts])
        )


def error_of_mean(figures: Sequence[Figure]) -> float:
    """The standard error of the mean of independent figures."""
    return math.hypot(*(figure.error for figure in figures)) / len(figures)
