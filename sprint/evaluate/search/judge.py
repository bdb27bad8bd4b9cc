"""What a step list is worth: its pictures, scored once and kept."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sprint.base.door import held_against, parse_json, read_bytes
from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.evaluate.metrics.gaussian import GaussianStatistics, fid, resampled_fid
from sprint.evaluate.metrics.real_scenes import real_statistics
from sprint.evaluate.result import Figure, share
from sprint.evaluate.search.lists import (
    BATCH,
    LINE_START,
    NOISE_OF_A_SERIES,
    REAL_SCENES,
    RESAMPLES,
    Search,
    Times,
)
from sprint.evaluate.store import in_batches
from sprint.lab.features import SceneFeatures, scene_features
from sprint.lab.reader import holds
from sprint.lab.scenes import Scene, scene
from sprint.lab.series import HELD_OUT_SEED, REAL_SEED
from sprint.sample.generate import StudentGenerator

LISTS_BYTES = 2**30  # of the file of judged lists


@dataclass(frozen=True)
class Judged:
    """A list's figure, and the parts by which two lists of one series are compared.

    parts   "scenes": 1 or 0 for every picture; "fid": FID of resamples of the pictures, the same for every list
    """

    figure: Figure
    parts: tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """A judged list in the file."""

    key: str
    times: Times
    series: int
    figure: Figure
    parts: tuple[float, ...]


def paired_error(a: Judged, b: Judged) -> float:
    """Standard error of the difference between two figures of the same captions and noise.

    Shares: of the mean of the pictures' differences, as in McNemar's test. FID: the deviation of the resamples'.
    """
    spread = float(np.std(np.subtract(a.parts, b.parts), ddof=1))
    return spread / math.sqrt(len(a.parts)) if a.figure.higher else spread


class Judge:
    """Lists of times, each drawn once and kept in a file of JSON lines."""

    def __init__(self, search: Search, generator: StudentGenerator, model: str, file: Path, bar: tqdm):
        self.search, self.generator, self.file, self.bar = search, generator, file, bar
        self.features: SceneFeatures | None = None
        if search.objective == "fid":
            self.features = scene_features(generator.family.device)
        network = self.features and self.features.name
        protocol = [model, network, search.objective, search.prompts, search.guidance, torch.__version__]
        self.key = hashlib.sha256(json.dumps(protocol).encode()).hexdigest()[:12]
        self.known = dict(filter(None, map(self._read, _whole_lines(file))))
        self.scenes: dict[int, list[Scene]] = {}
        self.real: GaussianStatistics | None = None

    def __call__(self, times: Times, series: int) -> Judged:
        """On the scenes of a series, each from its own noise, which no other series has."""
        place = (tuple(times), series)
        if place not in self.known:
            judged = self._measure(times, series)
            line = {"key": self.key, "times": times, "series": series, **asdict(judged)}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
            self.known[place] = judged
        return self.known[place]

    def _read(self, line: str) -> tuple[tuple[Times, int], Judged] | None:
        """None for a line of another model or protocol."""
        try:
            row = held_against(Line, parse_json(line, self.file), self.file)
        except SprintError as error:
            raise SprintError(
                f"{self.file}: not what search-steps wrote; delete it, or give another folder"
            ) from error
        if row.key != self.key:
            return None
        return (row.times, row.series), Judged(row.figure, row.parts)

    def _measure(self, times: Times, series: int) -> Judged:
        scenes = self.scenes.setdefault(series, [scene(series, i) for i in range(self.search.prompts)])
        pictures = self._draw(scenes, times, first_seed=(series - HELD_OUT_SEED) * NOISE_OF_A_SERIES)
        if self.features is None:
            verdicts = tuple(map(int, map(holds, pictures, [s.claim for s in scenes])))
            return Judged(share(sum(verdicts), len(verdicts)), verdicts)
        if self.real is None:
            self.real = real_statistics(self.features, REAL_SCENES, REAL_SEED)
        return judged_by_fid(self.features(pictures), self.real)

    def _draw(self, scenes: list[Scene], times: Times, first_seed: int) -> np.ndarray:
        captions = [s.caption for s in scenes]
        seeds = range(first_seed, first_seed + len(scenes))
        parts = []
        for part in in_batches(self.generator, captions, seeds, BATCH, times, self.search.guidance):
            parts.append(part)
            self.bar.update(len(times) - 1)
        return np.concatenate(parts)


def judged_by_fid(features: Tensor, real: GaussianStatistics) -> Judged:
    """FID of features [N, D], and its standard deviation over resamples of the pictures (bootstrap)."""
    resamples = resampled_fid(features, real, RESAMPLES)
    error = float(np.std(resamples, ddof=1))
    return Judged(Figure(fid(GaussianStatistics.of(features), real), error, higher=False), tuple(resamples))


def _whole_lines(file: Path) -> list[str]:
    """Of a file that lines are appended to; half of ours, of a program that was killed, is cut off."""
    if not file.is_file():
        return []
    text = read_bytes(file, LISTS_BYTES)
    whole, end, rest = text.rpartition(b"\n")
    if rest and rest[: len(LINE_START)] == LINE_START[: len(rest)]:
        write_whole(file, text := whole + end)
    return text.decode(errors="replace").splitlines()
