"""`sprint evaluate`: which models, which metrics on which prompts; drawn once, scored, written down.

Everything that can be wrong or missing is looked for before the first picture is drawn. Several processes
(torchrun) share the drawing; the first one scores.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from sprint.caching import Place
from sprint.convert.checkpoint import understand
from sprint.convert.convert import DTYPES
from sprint.convert.load import understand_teacher
from sprint.data.cache import family_weights, hash_files
from sprint.data.scenes import SIZE as SCENE_SIZE
from sprint.errors import NotHereError, SprintError
from sprint.evaluate.distance import FrechetDistance
from sprint.evaluate.latency import FLUX, contender, flux_contender
from sprint.evaluate.metrics import Choices, ClipScore, Drawn, GenEvalScore, Metric, SceneScore, Timing
from sprint.evaluate.page import PAGE, write_page
from sprint.evaluate.prompts import SCENES, Prompts, named_prompts, reference_prompts
from sprint.evaluate.result import FILE, Column, Result, write_result
from sprint.evaluate.store import Drawing, PictureStore, draw, wait_for
from sprint.generate import STUDENT_STEPS, load_generator, read_settings
from sprint.models.family import resolve
from sprint.train.page import environment

log = logging.getLogger(__name__)
LATENCY = Timing.name
METRICS = ("scenes", "fid", "clip", "geneval", LATENCY)  # in the order of the table
LEFT_OUT = "%s is left out: %s"
STUDENT, TEACHER = "student", "teacher"
STUDENT_DEFAULT, TEACHER_DEFAULT = (1, 2, 4), (20,)  # steps
SMALL_BATCH, LARGE_BATCH = 50, 10  # pictures drawn together: as small as scenes, and others
PICTURES, KEPT = "pictures", "features"  # folders beside result.json


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


@dataclass(frozen=True)
class Model:
    """One set of weights. `size`: pixels a side where its sprint.json tells."""

    path: str
    role: str
    steps: Sequence[int]
    size: int | None

    @property
    def small(self) -> bool:
        """Whether it draws pictures of the built-in scenes' size, which only their family does."""
        return self.size == SCENE_SIZE


@dataclass
class Way:
    """One model at one number of steps: its column, and its pictures where there are any."""

    column: Column
    store: PictureStore | None


def evaluate(options: Options) -> Result | None:
    """Draw what is missing, score, and write OUT/result.json and OUT/index.html.

    -> the result; None in a process that only draws. Raises SprintError for wrong input, before anything is
    drawn, and where nothing at all can be measured.
    """
    place = Place.of_this_process()
    models = find_models(options)
    names = _metric_names(options, models)
    prompts = _main_prompts(options, models)
    metrics = _make_metrics(names, options, models, prompts)
    _check_out(options.out)
    left_out = _open(metrics, place)
    metrics = [metric for metric in metrics if metric.name not in left_out]
    if not metrics and LATENCY not in names:
        raise NotHereError("; ".join(left_out.values()))
    for name, line in left_out.items():
        log.warning(LEFT_OUT, name, line)
    sets = {found.name: found for found in (metric.find() for metric in metrics)}
    ways = [way for model in models for way in _draw(model, sets, options, place)]
    if place.rank:
        return None
    timing = [Timing(prompts)] if LATENCY in names else []
    _measure(metrics, ways, sets, left_out)
    for clock in timing:
        ways += _measure_times(clock, models, ways, options)
    protocols = {m.name: m.protocol() for m in (*metrics, *timing) if m.name not in left_out}
    if not protocols:
        raise SprintError("nothing could be measured: " + "; ".join(left_out.values()))
    result = Result(
        name=evaluation_name(options.model),
        columns=[way.column for way in ways],
        sets={name: found.shots for name, found in sets.items()},
        protocols={name: protocols[name] for name in METRICS if name in protocols},
        left_out=left_out,
        settings=_settings(options),
        environment=environment(),
        recipe=_recipe(options.model),
        command=options.command,
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    write_result(options.out, result)
    write_page(options.out, result)
    return result


# ---- what is evaluated ------------------------------------------------------------------------------


def find_models(options: Options) -> list[Model]:
    """The model, or a run's student and teacher, and the teacher to compare with. Raises SprintError."""
    folder = Path(resolve(options.model))
    run = all((folder / role).is_dir() for role in (STUDENT, TEACHER))
    if not run and (folder / "recipe.yaml").is_file():
        raise SprintError(f"{folder}: a run that has no student yet; `sprint distill` it to the end")
    first = str(folder / STUDENT) if run else options.model
    second = options.teacher or (str(folder / TEACHER) if run else None)
    models = [_model(first, options.steps)]
    if second:
        understand_teacher(resolve(second))
        models.append(_model(second, ()))
    return models


def _model(path: str, steps: Sequence[int]) -> Model:
    checkpoint = understand(resolve(path))
    student = checkpoint.config["guidance_embeds"]
    steps = tuple(dict.fromkeys(steps)) or (STUDENT_DEFAULT if student else TEACHER_DEFAULT)
    for count in steps:
        if count < 1 or (student and count > STUDENT_STEPS):
            most = f"1 to {STUDENT_STEPS}" if student else "at least 1"
            raise SprintError(
                f"--steps {count}: {path} is a {'student' if student else 'teacher'} and takes {most}"
            )
    return Model(path, STUDENT if student else TEACHER, steps, read_settings(resolve(path)).size)


def evaluation_name(model: str) -> str:
    """runs/tiny -> tiny, runs/tiny/student -> tiny-student, owner/name -> name"""
    path = Path(model).expanduser()
    path = path.resolve() if path.exists() else path
    return f"{path.parent.name}-{path.name}" if path.name in (STUDENT, TEACHER) else path.name


def _recipe(model: str) -> str:
    """YAML of the run that the model came from, if its folder has it."""
    folder = Path(resolve(model))
    for file in (folder / "recipe.yaml", folder.parent / "recipe.yaml"):
        if folder.is_dir() and file.is_file():
            return file.read_text(encoding="utf-8")
    return ""


# ---- what is measured -------------------------------------------------------------------------------


def _metric_names(options: Options, models: Sequence[Model]) -> list[str]:
    for name in options.metrics:
        if name not in METRICS:
            raise SprintError(f"--metrics {name}: no such metric; there are {', '.join(METRICS)}")
    small = all(model.small for model in models)
    usual = [name for name in METRICS if name != ("geneval" if small else "scenes")]
    return [name for name in METRICS if name in (options.metrics or usual)]


def _main_prompts(options: Options, models: Sequence[Model]) -> Prompts | None:
    """What FID and CLIP score look at: --prompts, else the scenes or what --reference gives."""
    count, seed, reference = options.choices.count, options.choices.seed, options.choices.reference
    if options.prompts is not None:
        return named_prompts(options.prompts, count, seed)
    if reference is not None:
        return reference_prompts(reference, count, seed)
    return named_prompts(SCENES, count, seed) if all(model.small for model in models) else None


def _make_metrics(
    names: Sequence[str], options: Options, models: Sequence[Model], prompts: Prompts | None
) -> list[Metric]:
    """Raises SprintError for a metric that cannot read the models' pictures."""
    choices = options.choices
    metrics = [
        SceneScore(choices),
        FrechetDistance(choices, prompts),
        ClipScore(choices, prompts, fetch=bool(options.metrics) or not all(model.small for model in models)),
        GenEvalScore(choices),
    ]
    metrics = [metric for metric in metrics if metric.name in names]
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


def _measure(
    metrics: Sequence[Metric], ways: Sequence[Way], sets: dict[str, Prompts], left_out: dict[str, str]
) -> None:
    """Fill the columns. A metric that cannot go on is left out; the others are measured."""
    for way in ways:
        for prompts in sets.values():
            wait_for(way.store, prompts.shots)
    for metric in metrics:
        prompts = metric.find()
        try:
            measured = [metric.measure(Drawn(prompts, way.store, way.column.title)) for way in ways]
        except SprintError as error:
            left_out[metric.name] = str(error)
            log.warning(LEFT_OUT, metric.name, error)
            continue
        for way, found in zip(ways, measured, strict=True):
            way.column = replace(way.column, measured=way.column.measured | {metric.name: found})


# ---- drawing ----------------------------------------------------------------------------------------


def _draw(model: Model, sets: dict[str, Prompts], options: Options, place: Place) -> list[Way]:
    """This process's share of every set, at every number of steps."""
    generator = load_generator(model.path, options.choices.device, DTYPES[options.dtype])
    digest = model_hash(model.path)
    batch_size = options.batch_size or (SMALL_BATCH if model.small else LARGE_BATCH)
    ways = []
    for steps in model.steps:
        times = tuple(generator.times(steps))
        drawing = Drawing(digest, times, options.guidance, generator.size, options.dtype)
        store = PictureStore(options.out / PICTURES, drawing)
        column = Column(model.role, steps, model.path, digest, times, f"{PICTURES}/{store.folder.name}")
        for prompts in sets.values():
            what = f"drawing {prompts.name}, {column.title}"
            draw(generator, store, prompts.shots, batch_size, what, place.rank, place.processes)
        if sets and place.rank == 0:
            store.describe(model.path)
        ways.append(Way(column, store))
    return ways


def model_hash(path: str) -> str:
    """SHA-256 over the weights of network, text encoder and autoencoder, and how prompts are read.

    path   a model that was loaded before, so that its files are here
    """
    name = resolve(path)
    network, settings = understand(name), read_settings(name)
    weights = family_weights(name) or {}
    weights["network"] = hash_files(network.source.files)
    facts = {"weights": weights, "time_scale": network.time_scale, "settings": settings._asdict()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _measure_times(
    clock: Timing, models: Sequence[Model], ways: Sequence[Way], options: Options
) -> list[Way]:
    """Fill the columns with latencies.  -> columns of models that only time is measured of"""
    device, dtype = options.choices.device, DTYPES[options.dtype]
    contenders = []
    for model in models:
        generator = load_generator(model.path, device, dtype)
        contenders += [contender(generator, steps, options.guidance) for steps in model.steps]
    others = []
    if not any(model.small for model in models) and torch.device(device).type == "cuda":
        with contextlib.suppress(NotHereError):
            flux = flux_contender(device=device)
            contenders.append(flux)
            others.append(Way(Column(flux.name, flux.steps, FLUX), None))
    roles = [way.column.role for way in ways]
    measured = clock.measure(contenders, roles.index(TEACHER) if TEACHER in roles else None)
    for way, found in zip((*ways, *others), measured, strict=True):
        way.column = replace(way.column, measured=way.column.measured | {clock.name: found})
    return others


# ---- what is told of it -----------------------------------------------------------------------------


def _check_out(out: Path) -> None:
    """Raises SprintError for a file, and for a folder of something else."""
    if out.exists() and not out.is_dir():
        raise SprintError(f"--out {out} is not a folder; give another one")
    known = {FILE, PAGE, PICTURES, KEPT}
    stranger = next((f.name for f in sorted(out.glob("*")) if f.name not in known and f.name[0] != "."), None)
    if stranger:
        raise SprintError(f"--out {out}: holds {stranger} and no evaluation; give another folder")


def _settings(options: Options) -> dict[str, str]:
    return {
        "seeds": f"from {options.choices.seed} on, one a picture",
        "guidance": f"{options.guidance:g}",
        "dtype": options.dtype,
        "device": options.choices.device,
        "batch size": str(options.batch_size or "by default"),
    }
