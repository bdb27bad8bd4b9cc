"""`sprint evaluate`: which models, which metrics on which prompts; drawn once, scored, written down.

Everything that can be wrong or missing is looked for before the first picture is drawn. Several processes
(torchrun) share the drawing; the first one scores.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from sprint.base.dtypes import DTYPES
from sprint.base.environment import environment
from sprint.base.errors import NotHereError, SprintError
from sprint.base.place import Place
from sprint.evaluate.earlier import open_out, with_earlier
from sprint.evaluate.metrics.fid import FrechetDistance
from sprint.evaluate.metrics.latency import Timing, first_line, time_columns
from sprint.evaluate.metrics.metric import (
    Choices,
    ClipScore,
    Drawn,
    GenEvalScore,
    Metric,
)
from sprint.evaluate.metrics.scenes import SceneScore
from sprint.evaluate.models import Model, evaluation_name, find_models, recipe_of
from sprint.evaluate.page import write_page
from sprint.evaluate.prompts import (
    SCENES,
    Prompts,
    named_prompts,
    no_prompts,
    reference_prompts,
    scene_prompts,
)
from sprint.evaluate.published import FLUX_SCHNELL, SOURCE, Published, published
from sprint.evaluate.result import Column, Figure, Measured, Result, write_result
from sprint.evaluate.store import Drawing, PictureStore, draw, wait_for
from sprint.sample.load import load_generator
from sprint.weights.model_hash import model_hash

log = logging.getLogger(__name__)
LATENCY = Timing.name
METRICS = ("scenes", "fid", "clip", "geneval", LATENCY)  # in the order of the table
LEFT_OUT = "%s is left out: %s"
SMALL_BATCH, LARGE_BATCH = 50, 10  # pictures drawn together: as small as scenes, and others
PICTURES, KEPT, KEPT_REAL = (
    "pictures",
    "features",
    ".reference",
)  # folders: beside result.json, and beside OUT
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # OWNER/NAME


@dataclass(frozen=True)
class Options:
    """What to evaluate and how; what is empty or None is chosen by the model.

    model      student, teacher or run folder, hub id or built-in name; `teacher`: another one, to compare with
    metrics    of METRICS;  steps: of the student, or of a teacher that is evaluated alone
    prompts    "scenes", a folder of MJHQ-30K or a text file with a prompt a line
    """

    model: str
    out: Path
    choices: Choices
    teacher: str | None = None
    metrics: Sequence[str] = ()
    steps: Sequence[int] = ()
    prompts: str | None = None
    guidance: float = 4.5
    batch_size: int | None = None
    dtype: str = "fp32"
    command: str = ""


@dataclass
class Way:
    """One model at one number of steps: its column, and its pictures."""

    column: Column
    store: PictureStore


@dataclass
class Work:
    """What is known before anything is drawn; `left_out` grows."""

    options: Options
    models: Sequence[Model]
    names: Sequence[str]  # of metrics
    prompts: Prompts | NotHereError
    recipe: str
    earlier: Result | None
    left_out: dict[str, str]
    sets: dict[str, Prompts]

    def leave_out(self, name: str, error: Exception) -> None:
        self.left_out[name] = first_line(error)
        log.warning(LEFT_OUT, name, self.left_out[name])


def evaluate(options: Options) -> Result | None:
    """Draw what is missing, score, and write OUT/result.json and OUT/index.html, before times are taken and after.

    -> the result; None in a process that only draws. Raises SprintError for wrong input, before anything is
    drawn, and where nothing at all can be measured.
    """
    place = Place.of_this_process()
    check_paths(options.choices)
    models = find_models(options.model, options.teacher, options.steps)
    names = _metric_names(options, models)
    prompts = _main_prompts(options, models)
    metrics = _make_metrics(names, options, models, prompts)
    recipe = recipe_of(options.model)
    earlier = open_out(options.out, PICTURES, models[0]) if place.rank == 0 else None
    left_out = _open(metrics, place)
    metrics = [metric for metric in metrics if metric.name not in left_out]
    if not metrics and LATENCY not in names:
        raise NotHereError("; ".join(left_out.values()))
    for name, line in left_out.items() if place.rank == 0 else ():
        log.warning(LEFT_OUT, name, line)
    sets = {found.name: found for found in (metric.find() for metric in metrics)}
    work = Work(options, models, names, prompts, recipe, earlier, left_out, sets)
    ways = [way for model in models for way in _draw(model, work, place)]
    if place.rank:
        return None
    return _score(work, metrics, ways)


def _score(work: Work, metrics: Sequence[Metric], ways: Sequence[Way]) -> Result:
    """Measure and write; times last, since a device that fails there takes nothing else with it."""
    _measure(metrics, ways, work)
    measured = [metric for metric in metrics if metric.name not in work.left_out]
    columns = [way.column for way in ways]
    if LATENCY not in work.names:
        return _write(work, columns, measured, last=True)
    if measured:
        _write(work, columns, measured)
    options = work.options
    clock = Timing(work.prompts if isinstance(work.prompts, Prompts) else scene_prompts(None, 0))
    try:
        columns = time_columns(
            clock, columns, work.models, options.choices.device, DTYPES[options.dtype], options.guidance
        )
        measured = [*measured, clock]
    except (SprintError, RuntimeError) as error:
        work.leave_out(LATENCY, error)
    return _write(work, columns, measured, last=True)


# ---- what is measured -------------------------------------------------------------------------------


def check_paths(choices: Choices) -> None:
    """Raises SprintError for a path that is given and not there. What may be a hub id, OWNER/NAME, is none."""
    metadata = choices.geneval_metadata
    on_hub = metadata and HUB_ID.match(metadata) and (":" in metadata or not metadata.endswith(".jsonl"))
    given = {
        "--reference": choices.reference,
        "--inception-weights": choices.inception_weights,
        "--clip-model": None if HUB_ID.fullmatch(choices.clip_model or "") else choices.clip_model,
        "--geneval-detector": (
            None if HUB_ID.fullmatch(choices.geneval_detector or "") else choices.geneval_detector
        ),
        "--geneval-metadata": None if on_hub else metadata,
    }
    for option, path in given.items():
        if path is not None and not Path(path).expanduser().exists():
            hub = "" if option in ("--reference", "--inception-weights") else ", nor OWNER/NAME on the hub"
            raise SprintError(f"{option} {path}: no such file or folder{hub}")


def _metric_names(options: Options, models: Sequence[Model]) -> list[str]:
    for name in options.metrics:
        if name not in METRICS:
            raise SprintError(f"--metrics {name}: no such metric; there are {', '.join(METRICS)}")
    small = all(model.small for model in models)
    usual = [name for name in METRICS if name != ("geneval" if small else "scenes")]
    return [name for name in METRICS if name in (options.metrics or usual)]


def _main_prompts(options: Options, models: Sequence[Model]) -> Prompts | NotHereError:
    """What FID and CLIP score look at: --prompts, else the scenes or what --reference gives; or why there is none."""
    count, seed, reference = options.choices.count, options.choices.seed, options.choices.reference
    if options.prompts is not None:
        return named_prompts(options.prompts, count, seed)
    if reference is not None:
        try:
            return reference_prompts(reference, count, seed)
        except NotHereError as error:
            return error
    return named_prompts(SCENES, count, seed) if all(model.small for model in models) else no_prompts()


def _make_metrics(
    names: Sequence[str], options: Options, models: Sequence[Model], prompts: Prompts | NotHereError
) -> list[Metric]:
    """Raises SprintError for a metric that cannot read the models' pictures."""
    choices = options.choices
    makers: dict[str, Callable[[], Metric]] = {
        "scenes": lambda: SceneScore(choices),
        "fid": lambda: FrechetDistance(choices, prompts),
        "clip": lambda: ClipScore(
            choices, prompts, fetch=bool(options.metrics) or not all(model.small for model in models)
        ),
        "geneval": lambda: GenEvalScore(choices),
    }
    metrics = [make() for name, make in makers.items() if name in names]
    for metric in metrics:
        for model in models:
            if metric.size not in (None, model.size):
                size = f"{model.size} px" if model.size else "larger ones"
                raise SprintError(
                    f"{metric.name}: reads scenes of {metric.size} px, and {model.path} draws {size}"
                )
    return metrics


def _open(metrics: Sequence[Metric], place: Place) -> dict[str, str]:
    """Open every metric in the first process.  -> in every process, those that are left out and why"""
    left_out = {}
    for metric in metrics:
        try:
            metric.find()
            if place.rank == 0:
                metric.open()
        except NotHereError as error:
            left_out[metric.name] = str(error)
    return _agree(left_out, place)


def _agree(left_out: dict[str, str], place: Place) -> dict[str, str]:
    """What the first process found, in every process."""
    if place.processes == 1:
        return left_out
    shared = [left_out]
    torch.distributed.init_process_group("gloo")
    torch.distributed.broadcast_object_list(shared)
    torch.distributed.destroy_process_group()
    return shared[0]


def _measure(metrics: Sequence[Metric], ways: Sequence[Way], work: Work) -> None:
    """Fill the columns. A metric that cannot go on is left out; the others are measured."""
    for way in ways:
        for prompts in work.sets.values():
            wait_for(way.store, prompts.shots)
    for metric in metrics:
        prompts = metric.find()
        try:
            measured = [metric.measure(Drawn(prompts, way.store, way.column.title)) for way in ways]
        except SprintError as error:
            work.leave_out(metric.name, error)
            continue
        for way, found in zip(ways, measured, strict=True):
            way.column = replace(way.column, measured=way.column.measured | {metric.name: found})


def _draw(model: Model, work: Work, place: Place) -> list[Way]:
    """This process's share of every set, at every number of steps."""
    options = work.options
    generator = load_generator(model.path, options.choices.device, DTYPES[options.dtype])
    digest = model_hash(model.path)
    batch = options.batch_size or (SMALL_BATCH if model.small else LARGE_BATCH)
    ways = []
    for steps in model.steps:
        times = tuple(generator.times(steps))
        drawing = Drawing(digest, times, options.guidance, generator.size, options.dtype)
        store = PictureStore(options.out / PICTURES, drawing)
        column = Column(
            role=model.role,
            steps=steps,
            model=model.path,
            hash=digest,
            times=times,
            folder=f"{PICTURES}/{store.folder.name}",
            called=model.called,
            size=generator.size,
            dtype=options.dtype,
            batch=batch,
        )
        for prompts in work.sets.values():
            what = f"drawing {prompts.name}, {column.title}"
            draw(generator, store, prompts.shots, batch, what, place.rank, place.processes)
        if work.sets and place.rank == 0:
            store.describe(model.path)
        ways.append(Way(column, store))
    return ways


# ---- what is told of it -----------------------------------------------------------------------------


def _write(
    work: Work, columns: Sequence[Column], measured: Sequence[Metric | Timing], last: bool = False
) -> Result:
    """Write result and page, with what an earlier evaluation had besides. Raises SprintError for nothing at all."""
    if not measured:
        raise SprintError("nothing could be measured: " + "; ".join(work.left_out.values()))
    options, sets = work.options, work.sets
    result = Result(
        name=evaluation_name(options.model),
        columns=columns,
        sets={name: found.shots for name, found in sets.items()},
        used={metric.name: metric.find().name for metric in measured if metric.name != LATENCY},
        protocols={metric.name: metric.protocol() for metric in measured},
        left_out=dict(work.left_out),
        settings=_settings(options, columns),
        environment=environment(options.choices.device),
        recipe=work.recipe,
        command=options.command,
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    if work.earlier:
        result, dropped = with_earlier(result, work.earlier)
        for line in dropped if last else ():
            log.warning("earlier figures in %s are dropped: %s", options.out, line)
    protocols = {name: result.protocols[name] for name in METRICS if name in result.protocols}
    beside = beside_columns(result.columns, {model.path: model.paper for model in work.models})
    source = f"published: {SOURCE}" if beside else ""
    result = replace(result, protocols=protocols, published=beside, source=source)
    write_result(options.out, result)
    write_page(options.out, result)
    return result


def _settings(options: Options, columns: Sequence[Column]) -> dict[str, str]:
    drawn = [column for column in columns if column.hash]
    return {
        "seeds": f"from {options.choices.seed} on, one a picture",
        "guidance": f"{options.guidance:g}",
        "dtype": _told(drawn, lambda column: column.dtype),
        "picture size": _told(drawn, lambda column: f"{column.size} px"),
        "device": options.choices.device,
        "batch size": _told(drawn, lambda column: str(column.batch)),
    }


def _told(columns: Sequence[Column], fact: Callable[[Column], str]) -> str:
    """A fact of all columns once, or of each."""
    facts = {column.title: fact(column) for column in columns}
    values = set(facts.values())
    return (
        values.pop() if len(values) == 1 else "; ".join(f"{title}: {told}" for title, told in facts.items())
    )


def beside_columns(columns: Sequence[Column], sizes: dict[str, str | None]) -> list[Column]:
    """The paper's columns for ours, with those of its figures that we measured as well.

    sizes   of Sana-Sprint, by model's path
    """
    found = []
    for column in columns:
        size = FLUX_SCHNELL if column.role == FLUX_SCHNELL else sizes.get(column.model)
        if row := published(size or "", column.steps):
            measured = {m: Measured(f) for m, f in _published_figures(row).items() if m in column.measured}
            found.append(Column("published", row.steps, SOURCE, measured=measured, called=row.model))
    return found


def _published_figures(row: Published) -> dict[str, dict[str, Figure]]:
    return {
        "fid": {"FID": Figure(row.fid, higher=False, spec=".2f")},
        "clip": {"CLIP score": Figure(row.clip, spec=".2f")},
        "geneval": {"GenEval": Figure(row.geneval, spec=".2f")},
        LATENCY: {
            "latency, ms": Figure(1000 * row.latency, higher=False, spec=".0f"),
            "pictures a second": Figure(row.throughput, spec=".2f"),
        },
    }
