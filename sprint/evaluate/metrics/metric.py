"""What can be measured of pictures: which prompts a metric needs, how it goes about it, and the figures it gives.

A metric is opened before anything is drawn, so that what is not here is known first.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Protocol

import numpy as np
from huggingface_hub import try_to_load_from_cache

from sprint.base.errors import NotHereError
from sprint.evaluate.metrics.clip import VIT_L_14, ClipScorer
from sprint.evaluate.metrics.geneval import GenEval, read_metadata
from sprint.evaluate.metrics.geneval_rules import PICTURES, PROMPTS, is_official, summary
from sprint.evaluate.prompts import GENEVAL, Prompts, needed, spread
from sprint.evaluate.result import Figure, Measured, Shot, Verdicts, share
from sprint.evaluate.store import PictureStore

AT_ONCE = 50  # pictures read and scored together
BINOMIAL = "± is the binomial standard error, pictures taken as independent"


@dataclass(frozen=True)
class Choices:
    """What a user may choose about metrics; None where nothing was chosen.

    kept               folder for what need not be computed twice; `kept_real`: of real pictures, for every model
    count              pictures of each set, instead of all
    seed               of a set's first picture; the next ones count up
    reference          real pictures, which FID compares with
    geneval_metadata   GenEval's evaluation_metadata.jsonl
    geneval_detector   hub id or folder, as is clip_model;  inception_weights: a file
    """

    kept: Path
    kept_real: Path
    count: int | None = None
    seed: int = 0
    reference: Path | None = None
    geneval_metadata: str | None = None
    geneval_detector: str | None = None
    clip_model: str | None = None
    inception_weights: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Drawn:
    """A set as one model drew it. `title`: of the column, for progress bars."""

    prompts: Prompts
    store: PictureStore
    title: str

    @property
    def files(self) -> list[Path]:
        return [self.store.path(shot) for shot in self.prompts.shots]

    def batches(self, what: str) -> Iterator[np.ndarray]:
        """uint8 [B, H, W, 3], at most AT_ONCE at a time, in the order of the shots."""
        return self.store.batches(self.prompts.shots, AT_ONCE, f"{what}, {self.title}")


class Metric(Protocol):
    """One of --metrics that looks at pictures.

    size   pixels a side that it can read, None for any
    """

    name: str
    size: int | None

    def find(self) -> Prompts:
        """What it needs drawn. Raises NotHereError for what could be fetched and is not here."""

    def open(self) -> None:
        """Load networks. Raises NotHereError as well."""

    def protocol(self) -> dict[str, str]:
        """How it measures, facts by name."""

    def measure(self, drawn: Drawn) -> Measured:
        """Figures of what `find` asked for."""


# ---- CLIP score -------------------------------------------------------------------------------------


class ClipScore:
    """100 · cosine between CLIP's embeddings of picture and prompt."""

    name, size = "clip", None

    def __init__(self, choices: Choices, prompts: Prompts | NotHereError, fetch: bool = True):
        """fetch   whether the hub may be asked for weights that are not on this machine"""
        self.choices, self.prompts, self.fetch = choices, prompts, fetch

    def find(self) -> Prompts:
        return needed(self.prompts)

    def open(self) -> None:
        name = self.choices.clip_model or VIT_L_14
        here = Path(name).exists() or isinstance(try_to_load_from_cache(name, "config.json"), str)
        if not here and not self.fetch:
            raise NotHereError(
                f"no CLIP here; fetch it with `hf download {name}`, or ask for it with --metrics clip"
            )
        self.scorer = ClipScorer(name, self.choices.device)

    def protocol(self) -> dict[str, str]:
        return {
            "pictures": self.prompts.words,
            "network": self.scorer.protocol,
            "error": "± is the standard error of the mean",
        }

    def measure(self, drawn: Drawn) -> Measured:
        texts = [shot.prompt for shot in drawn.prompts.shots]
        scores: list[float] = []
        for batch in drawn.batches("CLIP score"):
            scores += self.scorer(batch, texts[len(scores) : len(scores) + len(batch)]).tolist()
        error = stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
        return Measured(
            {"CLIP score": Figure(fmean(scores), error, spec=".2f")},
            Verdicts(drawn.prompts.name, scores=[round(score, 3) for score in scores]),
        )


# ---- GenEval ----------------------------------------------------------------------------------------


class GenEvalScore:
    """The official protocol: 553 prompts, four pictures of each, an object detector and CLIP for colours."""

    name, size = "geneval", None

    def __init__(self, choices: Choices):
        self.choices = choices

    def find(self) -> Prompts:
        given = self.choices.geneval_metadata
        every = read_metadata(given) if given else read_metadata()
        chosen = spread(len(every), self.choices.count and math.ceil(self.choices.count / PICTURES))
        self.tasks = [every[i] for i in chosen for _ in range(PICTURES)]
        seeds = [self.choices.seed + PICTURES * i + k for i in chosen for k in range(PICTURES)]
        shots = [Shot(task.prompt, seed, task.tag) for task, seed in zip(self.tasks, seeds, strict=True)]
        words = f"{PICTURES} for each of {len(chosen)} prompts of {len(every)}"
        self.prompts = Prompts(GENEVAL, words, shots)
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
            "GenEval": Figure(found["overall"], error_of_mean(list(tags.values()))),
            **{f"GenEval: {tag.replace('_', ' ')}": figure for tag, figure in tags.items()},
            "GenEval: of all pictures": share(sum(correct), len(correct)),
            "GenEval: of prompts, one right": share(sum(p["correct"] > 0 for p in prompts), len(prompts)),
        }
        return Measured(figures, Verdicts(GENEVAL, correct, reasons=[verdict.reason for verdict in verdicts]))


def error_of_mean(figures: Sequence[Figure]) -> float:
    """The standard error of the mean of independent figures."""
    return math.hypot(*(figure.error for figure in figures)) / len(figures)
