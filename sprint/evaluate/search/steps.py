"""At which times should a student take its 2, 3 or 4 steps? One time is searched after the other.

SANA-Sprint (Table 7) fixes one time and goes on to the next. So do we, from the default list, first over all
multiples of a coarse spacing and then around the best by finer ones; but the paper searches the first time too, and
here that stays at the default list's. Lists are chosen on one series of built-in scenes, and the winner meets the
default on another, of other noise: the best of many lists is partly lucky where it was chosen, and is not where it is
confirmed. There it has to be better by two standard errors of the difference, taken picture by picture, since both
lists draw the same captions from the same noise. Neither series, nor its noise, is what a report scores.
"""

import hashlib
import itertools
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.data.source import HELD_OUT_SEED
from sprint.evaluate.metrics.gaussian import GaussianStatistics, fid, resampled_fid
from sprint.evaluate.result import Figure, share
from sprint.evaluate.run import model_hash
from sprint.lab.features import SceneFeatures, scene_features
from sprint.lab.reader import holds
from sprint.lab.scenes import SIZE, Scene, scene
from sprint.maths.schedule import MAX_TIME, student_times
from sprint.sample.generate import SETTINGS_FILE, StudentGenerator, load_generator
from sprint.train.report.columns import real_statistics
from sprint.weights.export import (
    CARD_FILE,
    INDEX_FILE,
    STEP_LISTS,
    complete_or_absent,
    show_times,
    step_lists,
)

SEARCH_SEED, CONFIRM_SEED, REAL_SEED = (HELD_OUT_SEED + k for k in (101, 102, 103))  # series of scenes
REAL_SCENES = 3000  # behind FID
NOISE_OF_A_SERIES = 10**6  # seeds that a series has to itself; reports take the first ones
NOISE = 2.0  # standard errors by which a list has to be better
STEPS = (2, 3, 4)  # numbers of steps that have a middle time, and that a student has a default list for
GRID = (0.2, 0.1, 0.05)  # radians: spacings, coarse to fine
OBJECTIVES = ("scenes", "fid")
BATCH = 50  # pictures in one call of the network
RESAMPLES = 50  # of the pictures, for the standard error of FID
LINE_START = b'{"key"'
LISTS_FILE, RESULT_FILE = "lists.jsonl", "search.json"

Times = tuple[float, ...]


@dataclass(frozen=True)
class Search:
    """What is searched and how.

    student     folder, built-in name or hub id
    steps       numbers of steps, each of STEPS
    objective   "scenes", the share of captions that hold, or "fid" with the features of `scene_features`
    prompts     scenes to choose on, and as many others to confirm on
    grid        spacings in radians, coarse to fine
    guidance    scale that the student embeds
    """

    student: str
    steps: tuple[int, ...] = STEPS
    objective: str = OBJECTIVES[0]
    prompts: int = 300
    grid: tuple[float, ...] = GRID
    guidance: float = 4.5

    def __post_init__(self):
        for steps in self.steps:
            if steps not in STEPS:
                raise SprintError(
                    f"--steps {steps}: lists are searched for 2, 3 and 4 steps, which have a middle"
                )
        if not self.steps or len(set(self.steps)) != len(self.steps):
            raise SprintError(f"--steps {','.join(map(str, self.steps))}: give each number once")
        if self.objective not in OBJECTIVES:
            raise SprintError(f"--objective {self.objective}: give one of {', '.join(OBJECTIVES)}")
        if self.prompts < 2:
            raise SprintError(f"--prompts {self.prompts}: give at least 2, and hundreds for a verdict")
        falling = all(a > b for a, b in itertools.pairwise(self.grid))
        if not self.grid or not falling or not 0.01 <= self.grid[-1] <= self.grid[0] <= 0.75:
            raise SprintError(
                f"--grid {','.join(map(str, self.grid))}: give spacings in radians from at most 0.75 "
                "down to at least 0.01, coarse to fine"
            )

    def lists(self, steps: int) -> int:
        """Lists that are scored for so many steps, at most."""
        everywhere = math.ceil(MAX_TIME / self.grid[0])
        return 1 + (steps - 1) * (everywhere + 2 * (len(self.grid) - 1)) + 2

    @property
    def calls(self) -> int:
        """Forwards of the network on BATCH pictures, at most."""
        return sum(self.lists(steps) * steps for steps in self.steps) * math.ceil(self.prompts / BATCH)


@dataclass(frozen=True)
class Found:
    """For one number of steps: the best list of the search beside the default one.

    searched, confirmed   figures of (default, best) on the two series; FID is lower where it is better
    error                 standard error of the difference between the confirmed ones, picture by picture
    times                 what to use: `best` where it is confirmed, else `default`
    """

    default: Times
    best: Times
    searched: tuple[Figure, Figure]
    confirmed: tuple[Figure, Figure]
    error: float

    @property
    def gain(self) -> float:
        """By how much the best list is better on fresh prompts."""
        default, best = self.confirmed
        return (best.value - default.value) * (1 if default.higher else -1)

    @property
    def holds(self) -> bool:
        """Whether that is more than `NOISE` standard errors of the difference."""
        return self.best != self.default and self.gain > NOISE * self.error

    @property
    def times(self) -> Times:
        return self.best if self.holds else self.default


# ---- the search itself -----------------------------------------------------------------------------------


def greedy_search(start: Times, grid: Sequence[float], score: Callable[[Times], float]) -> Times:
    """One middle time after the other: over all multiples of grid[0], then one finer spacing up and down.

    start   times from noise to 0; the first and the last stay (the paper moves the first one too)
    score   of a list; higher is better, and of equal ones the earlier stays. It is called again for the best
            list so far, so let it remember.
    """
    best = start
    for spacing in grid:
        for index in range(1, len(start) - 1):
            trials = candidates(best, index, spacing, everywhere=spacing == grid[0])
            best = max([best, *trials], key=score)
    return best


def candidates(times: Times, index: int, spacing: float, everywhere: bool) -> list[Times]:
    """Lists with another time at `index`, strictly between its neighbours.

    everywhere   all multiples of `spacing`, or else only `spacing` more and less
    """
    above, now, below = times[index - 1], times[index], times[index + 1]
    if everywhere:
        values = [k * spacing for k in range(1, math.ceil(above / spacing))]
    else:
        values = [now - spacing, now + spacing]
    rounded = [round(value, 4) for value in values]
    return [
        (*times[:index], value, *times[index + 1 :])
        for value in rounded
        if above > value > below and value != round(now, 4)
    ]


# ---- what a list is worth ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A list's figure, and the parts by which two lists of one series are compared.

    parts   "scenes": 1 or 0 for every picture; "fid": FID of resamples of the pictures, the same for every list
    """

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
            row = json.loads(line)
            if row["key"] != self.key:
                return None
            judged = Judged(Figure(**row["figure"]), tuple(row["parts"]))
            return (tuple(row["times"]), row["series"]), judged
        except (ValueError, KeyError, TypeError) as error:
            raise SprintError(f"{self.file}: not what search-steps wrote; give another --out") from error

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
        parts = []
        for start in range(0, len(scenes), BATCH):
            captions = [s.caption for s in scenes[start : start + BATCH]]
            seeds = list(range(first_seed + start, first_seed + start + len(captions)))
            parts.append(
                self.generator.pictures(
                    captions, seeds, guidance_scale=self.search.guidance, times=list(times)
                )
            )
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
    text = file.read_bytes()
    whole, end, rest = text.rpartition(b"\n")
    if rest and rest[: len(LINE_START)] == LINE_START[: len(rest)]:
        write_whole(file, text := whole + end)
    return text.decode(errors="replace").splitlines()


# ---- from a folder to a verdict ----------------------------------------------------------------------------


def search_steps(search: Search, out: Path, device: str = "cpu") -> dict[int, Found]:
    """Search for every number of steps, and write OUT/search.json.  -> what was found, by number of steps

    Interrupted, the same call goes on: OUT/lists.jsonl remembers every list. Raises SprintError for a teacher,
    and for a student of other pictures than built-in scenes.
    """
    generator = load_generator(search.student, device)
    if not isinstance(generator, StudentGenerator):
        raise SprintError(f"{search.student} is a teacher; step lists are searched for students")
    if generator.size != SIZE:
        raise SprintError(
            f"{search.student} draws {generator.size} pixels; lists are scored on built-in scenes, {SIZE} pixels"
        )
    model = model_hash(search.student)
    found, calls = {}, 0
    with tqdm(total=search.calls, desc="searching", unit="call") as bar:
        judge = Judge(search, generator, model, out / LISTS_FILE, bar)
        for steps in search.steps:
            bar.set_description(f"searching {steps} steps")
            found[steps] = _search(judge, tuple(student_times(steps)))
            calls += search.lists(steps) * steps * math.ceil(search.prompts / BATCH)
            bar.update(calls - bar.n)  # lists that were known, or did not exist, cost nothing
    _write_result(search, found, model, judge.features and judge.features.name, out)
    return found


def _search(judge: Judge, default: Times) -> Found:
    def score(times: Times) -> float:
        figure = judge(times, SEARCH_SEED).figure
        return figure.value if figure.higher else -figure.value

    best = greedy_search(default, judge.search.grid, score)
    both = default, best
    searched, confirmed = (tuple(judge(t, seed) for t in both) for seed in (SEARCH_SEED, CONFIRM_SEED))
    figures = (tuple(judged.figure for judged in pair) for pair in (searched, confirmed))
    return Found(default, best, *figures, paired_error(*confirmed))


def _write_result(
    search: Search, found: dict[int, Found], model: str, network: str | None, out: Path
) -> None:
    record = {
        "search": asdict(search),
        "model_sha256": model,
        "feature_network": network,
        "series": {"searched": SEARCH_SEED, "confirmed": CONFIRM_SEED},
        "calls_at_most": search.calls,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "steps": {
            steps: asdict(row) | {"times": row.times, "holds": row.holds} for steps, row in found.items()
        },
    }
    write_whole(out / RESULT_FILE, json.dumps(record, indent=1) + "\n")


def table(found: dict[int, Found]) -> str:
    """For the terminal: both lists of every number of steps, and which to use."""
    lines = [f"{'steps':6}{'times':42}{'searched':>16}{'fresh prompts':>16}"]
    for steps, row in found.items():
        pairs = zip(("default", "found"), (row.default, row.best), row.searched, row.confirmed, strict=True)
        for i, (name, times, searched, confirmed) in enumerate(pairs):
            if i and row.best == row.default:
                continue
            told = f"{name:8}{show_times(times)}"
            lines.append(f"{'' if i else steps!s:6}{told:42}{searched!s:>16}{confirmed!s:>16}")
        lines.append(f"{'':6}{verdict(row)}")
    return "\n".join(lines)


def verdict(row: Found) -> str:
    if row.best == row.default:
        return "no list was better: the default stays"
    if row.holds:
        return f"better by {row.gain:.3f} ± {row.error:.3f} on fresh prompts: use it"
    told = f"better by {row.gain:.3f} ± {row.error:.3f}, too little," if row.gain > 0 else "no better"
    return f"{told} on fresh prompts: the default stays"


# ---- for later use -------------------------------------------------------------------------------------


def check_adoptable(student: str | Path) -> Path:
    """The folder itself. Raises SprintError unless sprint exported it."""
    folder = Path(student)
    if not (folder / INDEX_FILE).is_file() or not (folder / SETTINGS_FILE).is_file():
        raise SprintError(f"{student} is no folder that sprint exported; --adopt writes into one")
    return folder


def adopt(student: str | Path, found: Mapping[int, Found]) -> Path:
    """Make what was confirmed the student's own lists: in sprint.json, which `sprint sample` and all that
    draws with sprint read, and in its model card, which says how diffusers is told.  -> sprint.json

    For searched numbers of steps whose default stays, an earlier list of its own goes. Whole or not at all.
    Raises SprintError for anything but an exported folder.
    """
    folder = check_adoptable(student)
    settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    own = {len(times) - 1: times for times in settings.pop("times", [])}
    own = {steps: times for steps, times in own.items() if steps not in found}
    own |= {steps: row.times for steps, row in found.items() if row.holds}
    if own:
        settings["times"] = [[round(t, 6) for t in own[steps]] for steps in sorted(own)]
    card = folder / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    with complete_or_absent(folder) as place:
        shutil.copytree(folder, place, copy_function=_link, dirs_exist_ok=True)
        write_whole(place / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
        write_whole(place / CARD_FILE, text.partition(STEP_LISTS)[0].rstrip("\n") + "\n" + step_lists(own))
    return folder / SETTINGS_FILE


def _link(source: str, target: str) -> None:
    """The same file under another name; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
