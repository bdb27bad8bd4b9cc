"""`sprint evaluate`: drawn once, scored, written down. The end of `sprint distill` is this as well.

Everything that can be wrong or missing is looked for before the first picture is drawn. Several processes
(torchrun) share the drawing; the first one scores.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from sprint.base.dtypes import DTYPES
from sprint.base.errors import NotHereError, SprintError
from sprint.base.place import Place
from sprint.evaluate.choices import (
    Options,
    check_paths,
    chosen_metrics,
    completed,
    main_prompts,
    make_meters,
    usual_of_own_prompts,
)
from sprint.evaluate.earlier import open_out
from sprint.evaluate.metrics.latency import Timing, time_columns
from sprint.evaluate.metrics.metric import Drawn, Meter
from sprint.evaluate.metrics.registry import LATENCY
from sprint.evaluate.models import TEACHER, Model, find_models, own_evaluation, recipe_of
from sprint.evaluate.prompts import Prompts, scene_prompts
from sprint.evaluate.record import SKIPPED, Evaluation
from sprint.evaluate.result import Column, Result
from sprint.evaluate.store import Drawing, PictureStore, draw, wait_for
from sprint.sample.load import load_generator
from sprint.weights.model_hash import model_hash

log = logging.getLogger(__name__)
PICTURES = "pictures"  # folder beside result.json


class DrawnColumn(NamedTuple):
    """One model at one number of steps, and its pictures."""

    column: Column
    store: PictureStore


def evaluate(options: Options, place: Place | None = None) -> Result | None:
    """Draw what is missing, score, and write OUT/result.json and OUT/index.html, before times are taken and after.

    place   of this process among those that share the drawing, by default as torchrun says

    -> the result; None in a process that only draws. Raises SprintError for wrong input, before anything is
    drawn, and where nothing at all can be measured.
    """
    place = place or Place.of_this_process()
    evaluation = _prepare(options, place)
    drawn = [one for model in evaluation.models for one in _draw(model, evaluation, place)]
    return None if place.rank else _score(evaluation, drawn)


def _prepare(options: Options, place: Place) -> Evaluation:
    """Look for everything that is needed, and load what judges."""
    check_paths(options.choices)
    own = own_evaluation(options.model)
    models = find_models(options.model, options.teacher, options.steps, own, options.family)
    options = completed(options, models, own)
    metrics = chosen_metrics(options.metrics or usual_of_own_prompts(options), models)
    prompts = main_prompts(options, models)
    meters = make_meters(metrics, options.choices, models, prompts)
    recipe = recipe_of(options.model)
    earlier = open_out(options.out, PICTURES, models[0]) if place.rank == 0 else None
    left_out = _open(meters, place)
    meters = [meter for meter in meters if meter.metric.name not in left_out]
    timed = LATENCY in metrics
    if not meters and not timed:
        raise NotHereError("; ".join(left_out.values()))
    for name, line in left_out.items() if place.rank == 0 else ():
        log.warning(SKIPPED, name, line)
    wanted = {meter.metric.name: meter.find() for meter in meters}
    return Evaluation(options, models, meters, timed, prompts, wanted, left_out, recipe, earlier)


def _open(meters: Sequence[Meter], place: Place) -> dict[str, str]:
    """Open every meter in the first process.  -> in every process, the metrics that are left out and why"""
    left_out = {}
    for meter in meters:
        try:
            meter.find()
            if place.rank == 0:
                meter.open()
        except NotHereError as error:
            left_out[meter.metric.name] = str(error)
    return _broadcast(left_out, place)


def _broadcast(left_out: dict[str, str], place: Place) -> dict[str, str]:
    """What the first process found, in every process."""
    if place.processes == 1:
        return left_out
    shared = [left_out]
    try:
        torch.distributed.init_process_group("gloo")
        torch.distributed.broadcast_object_list(shared)
        torch.distributed.destroy_process_group()
    except torch.distributed.DistError as error:
        raise SprintError(
            f"rank {place.rank}: not all {place.processes} processes met; look whether each was started"
        ) from error
    return shared[0]


def _draw(model: Model, evaluation: Evaluation, place: Place) -> list[DrawnColumn]:
    """This process's share of every set, at every number of steps."""
    options, sets = evaluation.options, evaluation.sets
    generator = load_generator(model.path, options.choices.device, DTYPES[options.dtype], model.family)
    digest = model_hash(model.path, model.family)
    drawn = []
    for steps in model.steps:
        times = tuple(generator.times(steps))
        drawing = Drawing(digest, times, options.guidance, generator.size, options.dtype)
        store = PictureStore(options.out / PICTURES, drawing)
        column = Column(
            role=model.role_at(steps),
            steps=steps,
            model=model.path,
            hash=digest,
            times=times,
            folder=f"{PICTURES}/{store.folder.name}",
            called=model.called,
            size=generator.size,
            dtype=options.dtype,
            batch=options.batch_size,
            depth=generator.view.sizes.depth,
        )
        for prompts in sets.values():
            what = f"drawing {prompts.name}, {column.title}"
            took = draw(
                generator, store, prompts.shots, options.batch_size, what, place.rank, place.processes
            )
            evaluation.drew |= bool(took.pictures) or place.processes > 1  # the others do not tell
            if place.rank == 0:
                store.describe(model.path, took)
        drawn.append(DrawnColumn(column, store))
    return drawn


def _score(evaluation: Evaluation, drawn: Sequence[DrawnColumn]) -> Result:
    """Measure and write; times last, since a device that fails there takes nothing else with it."""
    columns = _measure(evaluation, drawn)
    if not evaluation.timed:
        return evaluation.write(columns)
    if evaluation.protocols:
        evaluation.write(columns, last=False)
    options, prompts = evaluation.options, evaluation.prompts
    clock = Timing(prompts if isinstance(prompts, Prompts) else scene_prompts(None, 0))
    device, dtype = options.choices.device, DTYPES[options.dtype]
    try:
        columns = time_columns(clock, columns, evaluation.models, device, dtype, options.guidance)
        evaluation.protocols[LATENCY.name] = clock.protocol()
    except (SprintError, RuntimeError) as error:
        evaluation.leave_out(LATENCY.name, error)
    return evaluation.write(columns)


def _measure(evaluation: Evaluation, drawn: Sequence[DrawnColumn]) -> list[Column]:
    """Columns with their figures, those that are known from an earlier evaluation as they were.

    A metric that cannot go on is left out; the others are measured.
    """
    for _, store in drawn:
        for prompts in evaluation.sets.values():
            wait_for(store, prompts.shots)
    columns = [column for column, _ in drawn]
    teacher = next((store for column, store in reversed(drawn) if column.role == TEACHER), None)
    for meter in evaluation.meters:
        name = meter.metric.name
        if found := evaluation.measured_before(meter, columns):
            evaluation.protocols[name] = dict(evaluation.earlier.protocols[name])
        else:
            try:
                prompts = evaluation.wanted[name]
                found = [meter.measure(Drawn(prompts, store, c.title, teacher)) for c, store in drawn]
            except SprintError as error:
                evaluation.leave_out(name, error)
                continue
            evaluation.protocols[name] = meter.protocol()
        columns = [
            replace(column, measured=column.measured | {name: measured})
            for column, measured in zip(columns, found, strict=True)
        ]
    return columns
