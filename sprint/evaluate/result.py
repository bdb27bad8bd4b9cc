"""What an evaluation found, as plain data: result.json, which the page and `sprint compare` read."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sprint.errors import SprintError
from sprint.files import write_whole

FILE = "result.json"
FORMAT = 1  # of the file; another number is refused
KEY_DIGITS = 12  # hex digits of SHA-256 in the names of files


class Shot(NamedTuple):
    """A picture to draw, and the heading it is counted under, such as "counting"."""

    prompt: str
    seed: int
    group: str = ""

    @property
    def file(self) -> str:
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()[:KEY_DIGITS]
        return f"{self.seed:08d}-{digest}.png"


@dataclass(frozen=True)
class Figure:
    """One number of a table.

    error    one standard error of `value`, from the number of pictures alone
    higher   whether more is better
    spec     how it is printed
    """

    value: float
    error: float | None = None
    higher: bool = True
    spec: str = ".3f"

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return "–"
        return f"{self.value:{self.spec}}" + (
            f" ± {self.error:{self.spec}}" if self.error is not None else ""
        )


def share(correct: int, count: int) -> Figure:
    """A share of pictures with its binomial standard error, √(p(1 − p)/n)."""
    p = correct / count
    return Figure(p, math.sqrt(p * (1 - p) / count))


@dataclass(frozen=True)
class Verdicts:
    """What a metric says of each picture of a set, in the order of the set; a list that it has no use for is empty."""

    prompts: str  # name of the set
    correct: Sequence[bool] = ()
    scores: Sequence[float] = ()
    reasons: Sequence[str] = ()


@dataclass(frozen=True)
class Measured:
    """What a metric says of one way of drawing. Figures by name, in the order of the table."""

    figures: Mapping[str, Figure]
    verdicts: Verdicts | None = None


@dataclass(frozen=True)
class Column:
    """One model at one number of steps.

    role       "student", "teacher", or the name of another model
    model      where it lies; `hash`: SHA-256 of its weights and text settings
    times      TrigFlow times in radians
    folder     of its pictures, relative to result.json; empty where only time was measured
    """

    role: str
    steps: int
    model: str
    hash: str = ""
    times: Sequence[float] = ()
    folder: str = ""
    measured: Mapping[str, Measured] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.role}, {self.steps} step{'s' * (self.steps != 1)}"


@dataclass(frozen=True)
class Result:
    """An evaluation.

    sets        what was drawn, by name
    protocols   by metric, how it was measured: facts by name; two figures compare where these agree
    left_out    by metric, why it was not measured
    settings    seed, guidance, batch size, … of the drawing
    recipe      YAML of the training run, if it is known
    """

    name: str
    columns: Sequence[Column] = ()
    sets: Mapping[str, Sequence[Shot]] = field(default_factory=dict)
    protocols: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    recipe: str = ""
    command: str = ""
    made: str = ""  # when, ISO 8601

    def rows(self) -> dict[tuple[str, str], list[Figure | None]]:
        """The table: (metric, figure's name) -> a figure or None for each column."""
        names = [
            (metric, name) for c in self.columns for metric, m in c.measured.items() for name in m.figures
        ]
        order = {metric: place for place, metric in enumerate(self.protocols)}
        unique = sorted(dict.fromkeys(names), key=lambda name: order.get(name[0], len(order)))
        return {
            (metric, name): [
                c.measured[metric].figures.get(name) if metric in c.measured else None for c in self.columns
            ]
            for metric, name in unique
        }


# ---- as a file --------------------------------------------------------------------------------------


def write_result(folder: Path, result: Result) -> Path:
    """-> FOLDER/result.json; numbers that are not finite become null."""
    data = {"format": FORMAT, **_plain(dataclasses.asdict(result))}
    return write_whole(Path(folder) / FILE, json.dumps(data, ensure_ascii=False, indent=None) + "\n")


def read_result(path: str | Path) -> Result:
    """What `write_result` wrote: a folder or the file in it. Raises SprintError for anything else."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise SprintError(f"{path}: no {FILE} there; name a folder that `sprint evaluate` wrote")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data.pop("format") != FORMAT:
            raise SprintError(f"{file}: another version of sprint wrote it; evaluate again")
        data["columns"] = [_column(column) for column in data["columns"]]
        data["sets"] = {name: [Shot(*shot) for shot in shots] for name, shots in data["sets"].items()}
        return Result(**data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SprintError(f"{file}: not a result of `sprint evaluate`") from error


def _column(data: dict) -> Column:
    measured = {}
    for metric, parts in data.pop("measured").items():
        figures = {name: Figure(**_number(figure)) for name, figure in parts["figures"].items()}
        verdicts = parts["verdicts"] and Verdicts(**parts["verdicts"])
        measured[metric] = Measured(figures, verdicts)
    return Column(**data, measured=measured)


def _number(figure: dict) -> dict:
    return figure if figure["value"] is not None else figure | {"value": math.nan}


def _plain(value):
    """JSON has no NaN: null instead, at any depth."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
