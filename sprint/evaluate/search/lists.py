"""What is searched: step lists, on which scenes, and what was found."""

import itertools
import math
from dataclasses import dataclass

from sprint.base.errors import SprintError
from sprint.evaluate.result import Figure
from sprint.maths.schedule import MAX_TIME
from sprint.recipe.settings import GUIDANCE

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
        if not GUIDANCE.holds(self.guidance):
            raise SprintError(f"guidance {self.guidance}: give a number {GUIDANCE.words}")
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
