"""What an evaluation found, as plain data: result.json, which the page and `sprint compare` read."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sprint.base.door import read_json, shown
from sprint.base.errors import SprintError
from sprint.base.files import write_whole

FILE = "result.json"
RESULT_BYTES = 2**30
FORMAT = 1  # of the file; another number is refused
SPEC = re.compile(r"\.\d[fg]")  # how figures may be printed
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

    error    what stands after ±, if anything; what it is, the metric's protocol says
    higher   whether more is better
    spec     how numbers are printed
    note     words behind them
    """

    value: float
    error: float | None = None
    higher: bool = True
    spec: str = ".3f"
    note: str = ""

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return "–"
        error = "" if self.error is None else f" ± {self.error:{self.spec}}"
        return f"{self.value:{self.spec}}{error}" + (f" ({self.note})" if self.note else "")


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
    model      where it lies; `hash`: its `model_hash`, empty for what we do not draw with
    times      TrigFlow times in radians
    folder     of its pictures, relative to result.json; empty where only time was measured
    called     tells it from another model of the same role; empty where there is none
    size       pixels a side;  dtype: of the weights;  batch: pictures drawn together
    depth      blocks of its network; 0 where that is not known
    """

    role: str
    steps: int
    model: str
    hash: str = ""
    times: Sequence[float] = ()
    folder: str = ""
    measured: Mapping[str, Measured] = field(default_factory=dict)
    called: str = ""
    size: int = 0
    dtype: str = ""
    batch: int = 0
    depth: int = 0

    def figure(self, metric: str, name: str) -> Figure | None:
        return self.measured[metric].figures.get(name) if metric in self.measured else None

    def verdicts(self, metric: str) -> Verdicts | None:
        return self.measured[metric].verdicts if metric in self.measured else None

    @property
    def who(self) -> str:
        return f"{self.role} {self.called}".rstrip()

    @property
    def title(self) -> str:
        return f"{self.who}, {self.steps} step{'s' * (self.steps != 1)}"


@dataclass(frozen=True)
class Result:
    """An evaluation.

    sets        what was drawn, by name;  used: by metric, the name of the one it looked at
    protocols   by metric, how it was measured: facts by name; two figures compare where these agree
    left_out    by metric, why it was not measured
    settings    seed, guidance, batch size, … of the drawing
    recipe      YAML of the training run, if it is known
    command     a line for each that brought figures
    published   columns of others' figures, to stand beside ours;  source: where they are from
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
    used: Mapping[str, str] = field(default_factory=dict)
    published: Sequence[Column] = ()
    source: str = ""

    def rows(self, columns: Sequence[Column] | None = None) -> dict[tuple[str, str], list[Figure | None]]:
        """The table: (metric, figure's name) -> a figure or None for each column, our own if none are given."""
        columns = self.columns if columns is None else columns
        names = [(metric, name) for c in columns for metric, m in c.measured.items() for name in m.figures]
        order = {metric: place for place, metric in enumerate(self.protocols)}
        unique = sorted(dict.fromkeys(names), key=lambda name: order.get(name[0], len(order)))
        return {(metric, name): [c.figure(metric, name) for c in columns] for metric, name in unique}


# ---- as a file --------------------------------------------------------------------------------------


def write_result(folder: Path, result: Result) -> Path:
    """-> FOLDER/result.json; numbers that are not finite become null."""
    data = {"format": FORMAT, **plain(dataclasses.asdict(result))}
    return write_whole(Path(folder) / FILE, json.dumps(data, ensure_ascii=False, indent=None) + "\n")


def read_result(path: str | Path) -> Result:
    """What `write_result` wrote: a folder or the file in it. Raises SprintError for anything else."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise SprintError(f"{path}: no {FILE} there; name a folder that `sprint evaluate` wrote")
    try:
        data = read_json(file, RESULT_BYTES)
        if data.pop("format") != FORMAT:
            raise SprintError(f"{file}: another version of sprint wrote it; evaluate again")
        return _result(data)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        reason = f" ({shown(error)})" if isinstance(error, TypeError) else ""
        raise SprintError(f"{file}: not a result of `sprint evaluate`{reason}; delete it") from error


def _result(data: dict) -> Result:
    """From what JSON gives. Raises TypeError, and others, where that is no result."""
    columns = [_column(column) for column in data.pop("columns")]
    published = [_column(column) for column in data.pop("published", [])]
    sets = {name: [_shot(*shot) for shot in shots] for name, shots in data.pop("sets").items()}
    texts = [data.get(name, "") for name in ("name", "recipe", "command", "made", "source")]
    groups = [*data["protocols"].values(), *(data[name] for name in ("left_out", "settings", "environment"))]
    for facts in (*groups, data.get("used", {}), dict(enumerate(texts))):
        _check("facts", facts.values(), str)
    result = Result(**data, columns=columns, published=published, sets=sets)
    if not columns:
        raise TypeError("no columns")
    if strangers := {*result.used.values()} - sets.keys():
        raise TypeError(f"no set is called {min(strangers)!r}")
    _check_alike(columns)
    for column in columns:
        for metric, measured in column.measured.items():
            _check_verdicts(metric, measured.verdicts, sets)
    return result


def _shot(prompt: str, seed: int, group: str = "") -> Shot:
    _check("prompts", [prompt, group], str)
    _check("seeds", [seed], int)
    return Shot(prompt, seed, group)


def _column(data: dict) -> Column:
    measured = {}
    for metric, parts in data.pop("measured").items():
        figures = {name: _figure(**figure) for name, figure in parts["figures"].items()}
        measured[metric] = Measured(figures, parts["verdicts"] and Verdicts(**parts["verdicts"]))
    column = Column(**data, measured=measured)
    words = [column.role, column.model, column.hash, column.folder, column.called, column.dtype]
    _check("a column's names", words, str)
    _check("a column's counts", [column.steps, column.size, column.batch, column.depth], int)
    _check("times", column.times, (int, float))
    return dataclasses.replace(column, times=[float(t) for t in column.times])


def _figure(value: float | None, error: float | None, higher: bool, spec: str, note: str = "") -> Figure:
    _check("figures", [x for x in (value, error) if x is not None], (int, float))
    _check("a figure's words", [spec, note], str)
    if not SPEC.fullmatch(spec):
        raise TypeError(f"no number is printed as {spec!r}")
    value, error = (None if number is None else float(number) for number in (value, error))
    return Figure(math.nan if value is None else value, error, bool(higher), spec, note)


def _check_verdicts(metric: str, verdicts: Verdicts | None, sets: Mapping[str, Sequence[Shot]]) -> None:
    if not verdicts:
        return
    count = len(sets[verdicts.prompts])
    for values, kind in ((verdicts.correct, bool), (verdicts.scores, (int, float)), (verdicts.reasons, str)):
        _check(f"{metric}: verdicts", values, kind)
        if len(values) not in (0, count):
            raise TypeError(f"{metric}: {len(values)} verdicts of {count} pictures")
    if not verdicts.correct and not verdicts.scores:
        raise TypeError(f"{metric}: verdicts without right or wrong and without scores")


def _check_alike(columns: Sequence[Column]) -> None:
    """Columns that one metric judged are of the same pictures, and judged in the same way."""
    for metric in {metric for column in columns for metric in column.measured}:
        found = filter(None, (column.verdicts(metric) for column in columns))
        if len({(v.prompts, bool(v.correct), bool(v.scores), bool(v.reasons)) for v in found}) > 1:
            raise TypeError(f"{metric}: verdicts of two kinds")


def _check(what: str, values: Iterable, kind: type | tuple[type, ...]) -> None:
    """Raises TypeError for a value of another kind."""
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"{what}: {value!r} cannot be")


def plain(value):
    """JSON has no NaN: null instead, at any depth."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
