"""What a metric is: what pages, comparisons and the command line tell of it, and how it is taken.

To add one: its facts in `registry`, a meter in a file of its own, and that meter in `sprint.evaluate.choices.METERS`.
Nothing heavy is imported here, since `sprint evaluate --help` reads the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from sprint.evaluate.result import Figure, Measured

if TYPE_CHECKING:
    import numpy as np

    from sprint.evaluate.prompts import Prompts
    from sprint.evaluate.store import PictureStore

AT_ONCE = 50  # pictures read and scored together
BINOMIAL = "± is the binomial standard error, pictures taken as independent"


class Error(Enum):
    """What stands after ±."""

    none = "nothing"
    standard = "a standard error over prompts"
    spread = "a spread, of which no significance follows"


class Usual(Enum):
    """Of which models a metric is taken where none is named."""

    all = "all"
    scenes = "those that draw the built-in scenes"
    others = "those that draw anything else"
    beside_teacher = "those with a teacher beside them"
    none = "none"


@dataclass(frozen=True)
class Metric:
    """The facts of one of --metrics.

    name       on the command line and in result.json;  title: on pages
    about      what it says, in one line
    higher     whether more is better, of its first figure;  spec: how that is printed
    unit       "share" is drawn with a bar
    error      what its ± is
    pictures   whether it looks at pictures that were drawn and kept
    needs      what has to be installed or fetched for it, in words
    reading    how its figures are to be read, in a sentence
    below      what stands under a picture that it judges
    row        from a figure's name in result.json to its title in a table
    """

    name: str
    title: str
    about: str
    higher: bool
    spec: str = ".3f"
    unit: str = ""
    error: Error = Error.none
    pictures: bool = True
    needs: str = ""
    reading: str = ""
    below: str = ""
    usual: Usual = Usual.all
    row: Callable[[str], str] = str

    def figure(self, value: float, error: float | None = None) -> Figure:
        return Figure(value, error, self.higher, self.spec)


@dataclass(frozen=True)
class Choices:
    """What a user may choose about metrics; None where nothing was chosen.

    kept               folder for what need not be computed twice; `kept_real`: of real pictures, for every model
    count              pictures of each set, instead of all;  scenes: of the built-in ones, where `count` is None
    seed               of a set's first picture; the next ones count up
    reference          real pictures, which FID compares with
    geneval_metadata   GenEval's evaluation_metadata.jsonl
    geneval_detector   hub id or folder, as is clip_model;  inception_weights: a file
    fetch              whether the hub may be asked for a CLIP that is not on this machine
    """

    kept: Path
    kept_real: Path
    count: int | None = None
    scenes: int | None = None
    seed: int = 0
    reference: Path | None = None
    geneval_metadata: str | None = None
    geneval_detector: str | None = None
    clip_model: str | None = None
    inception_weights: str | None = None
    device: str = "cpu"
    fetch: bool = True


@dataclass(frozen=True)
class Drawn:
    """A set as one model drew it.

    title     of the column, for progress bars
    teacher   the same set as the teacher drew it at its own steps; None where no teacher is looked at
    """

    prompts: Prompts
    store: PictureStore
    title: str
    teacher: PictureStore | None = None

    @property
    def files(self) -> list[Path]:
        return [self.store.path(shot) for shot in self.prompts.shots]

    def batches(self, what: str) -> Iterator[np.ndarray]:
        """uint8 [B, H, W, 3], at most AT_ONCE at a time, in the order of the shots."""
        return self.store.batches(self.prompts.shots, AT_ONCE, f"{what}, {self.title}")


class Meter(Protocol):
    """What takes a metric that looks at pictures. It is opened before anything is drawn, so that what is not here
    is known first. Made from `Choices` and the prompts to draw, or why there are none.

    size   pixels a side that it can read, None for any
    """

    metric: ClassVar[Metric]
    size: int | None

    def find(self) -> Prompts:
        """What it needs drawn. Raises NotHereError for what could be fetched and is not here."""

    def open(self) -> None:
        """Load networks. Raises NotHereError as well."""

    def protocol(self) -> dict[str, str]:
        """How it measures, facts by name."""

    def measure(self, drawn: Drawn) -> Measured:
        """Figures of what `find` asked for."""
