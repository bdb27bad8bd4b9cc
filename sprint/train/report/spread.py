"""How far runs of one recipe lie apart: other seeds, and the kernels of another processor.

`python -m tools.spread` trains them and writes `SPREAD_FILE`; reports and cards of that recipe quote it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from sprint import lab
from sprint.base.door import read_as
from sprint.pages import html
from sprint.recipe.load import recipe_hash
from sprint.recipe.schema import Recipe

SPREAD_FILE = Path(lab.__file__).parent / "spread.json"
GENERAL = "Another seed or another processor gives another run, and its figures differ too."


@dataclass(frozen=True)
class Runs:
    """One figure of one column, of every run.

    seeds     in the order of `Spread.seeds`
    kernels   of the first seed with the kernels of a smaller processor
    prompts   the standard error over prompts that a page prints, mean over the seeds; None for FID
    """

    role: str
    steps: int
    name: str
    seeds: Sequence[float]
    kernels: float | None = None
    prompts: float | None = None

    @property
    def mean(self) -> float:
        return fmean(self.seeds)

    @property
    def deviation(self) -> float:
        """Of a single run, from the seeds: n − 1 below the root; NaN for one."""
        return stdev(self.seeds) if len(self.seeds) > 1 else math.nan

    @property
    def shift(self) -> float | None:
        """What other kernels changed, seed and all else equal."""
        return None if self.kernels is None else self.kernels - self.seeds[0]


@dataclass(frozen=True)
class Spread:
    """What the runs came to. recipe: `family_hash` of theirs; machine: in words."""

    recipe: str
    name: str
    seeds: Sequence[int]
    figures: Sequence[Runs]
    machine: str = ""
    command: str = ""

    def of(self, role: str, steps: int, name: str) -> Runs | None:
        wanted = (role, steps, name)
        return next((runs for runs in self.figures if (runs.role, runs.steps, runs.name) == wanted), None)

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def family_hash(recipe: Recipe) -> str:
    """The same for recipes that differ in their seed alone."""
    return recipe_hash(replace(recipe, seed=0))


def read_spread(file: Path = SPREAD_FILE) -> Spread | None:
    """None where nobody has measured it. Raises SprintError for a file that is damaged."""
    return read_as(Spread, file) if file.is_file() else None


def spread_words(recipe: Recipe, role: str, steps: int, spread: Spread | None) -> str:
    """What another run would change of a column's score and FID, in a sentence; in general where nobody knows."""
    if spread is None or spread.recipe != family_hash(recipe):
        return GENERAL
    score, fid = (spread.of(role, steps, name) for name in ("scene score", "FID"))
    if score is None or fid is None:
        return GENERAL
    over_prompts = "" if score.prompts is None else f" (over prompts: ±{score.prompts:.3f})"
    text = (
        f"Between runs of this recipe, {len(score.seeds)} seeds on our machine, the score at {html.steps(steps)} moved "
        f"by ±{score.deviation:.3f}{over_prompts} and FID by ±{fid.deviation:.2g}"
    )
    if score.shift is not None and fid.shift is not None:
        text += f"; the kernels of a smaller processor moved them by {score.shift:+.3f} and {fid.shift:+.2g}"
    return f"{text}."
