"""What a recipe's values must be: ranges of single keys as a table, then what must hold between keys."""

import math
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path

from sprint.base.errors import SprintError
from sprint.recipe.schema import (
    DataKind,
    EngineKind,
    Optimizer,
    OptimizerKind,
    Recipe,
)
from sprint.recipe.shares import misfits

_OPTIMIZERS = ("adapt.optimizer", "distill.optimizer", "distill.adversarial.optimizer")
_DENSITIES = ("distill.consistency.time", "distill.adversarial.time")


def _each(groups: tuple[str, ...], *names: str) -> tuple[str, ...]:
    return tuple(f"{group}.{name}" for group in groups for name in names)


_RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "at least 0",
        lambda v: 0 <= v < math.inf,
        (
            *("seed", "data.seed", "adapt.steps", "distill.steps"),
            *("distill.consistency.weight", "distill.adversarial.weight", "distill.self_consistency"),
            *("evaluate.prompts", "evaluate.guidance_scale", "data.guidance_scale", "shard_size"),
            *_each(_OPTIMIZERS, "weight_decay", "warmup_steps"),
        ),
    ),
    (
        "at least 1",
        lambda v: v >= 1,
        (
            *("data.size", "adapt.batch_size", "distill.batch_size", "evaluate.batch_size"),
            *("distill.consistency.tangent_warmup_updates", "evaluate.teacher_steps"),
            *("save_every", "log_every", "timeout", "data.workers", "data.teacher_steps"),
            "distill.adversarial.neighbours",
        ),
    ),
    ("at least 2", lambda v: v >= 2, ("text.max_length",)),
    (
        "above 0",
        lambda v: 0 < v < math.inf,
        (
            *("adapt.shift", "distill.consistency.tangent_normalisation", "data.caption_temperature"),
            *_each(_OPTIMIZERS, "lr", "clip_norm"),
            *_each(_DENSITIES, "std"),
        ),
    ),
    ("finite", math.isfinite, _each(_DENSITIES, "mean")),
    (
        "between 0 and 1",
        lambda v: 0 <= v <= 1,
        ("adapt.caption_dropout", "distill.adversarial.max_time_probability", "data.bad_share"),
    ),
    ("between 0 and 1", lambda v: 0 <= v <= 1, _each(_OPTIMIZERS, "decay_share")),
    ("at least 0 and below 1", lambda v: 0 <= v < 1, ("distill.ema_decay",)),
)


def validate(recipe: Recipe) -> None:
    """Raise a `SprintError` that names the first key whose value cannot work, and what would."""
    for words, holds, keys in _RANGES:
        for key in keys:
            value = attrgetter(key)(recipe)
            if not holds(value):
                raise SprintError(f"recipe {recipe.name}: {key} = {value}, but it must be {words}")
    for key in _OPTIMIZERS:
        _check_betas(recipe, key)
    for holds, problem in _relations(recipe):
        if not holds:
            raise SprintError(f"recipe {recipe.name}: {problem}")


def _check_betas(recipe: Recipe, key: str) -> None:
    optimizer: Optimizer = attrgetter(key)(recipe)
    count = {OptimizerKind.adamw: 2, OptimizerKind.came: 3}[optimizer.kind]
    if len(optimizer.betas) != count or not all(0 <= beta < 1 for beta in optimizer.betas):
        kind, betas = optimizer.kind.value, list(optimizer.betas)
        raise SprintError(
            f"recipe {recipe.name}: {key}.betas = {betas}, but {kind} takes {count} numbers in [0, 1)"
        )


def _relations(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    """(whether it holds, what is wrong if not), one pair for each thing that must hold."""
    from sprint.lab.scenes import SIZE

    yield from _relations_of_engine(recipe)
    data, distill, adversarial = recipe.data, recipe.distill, recipe.distill.adversarial
    scenes = data.kind is DataKind.scenes
    yield (
        Path(recipe.name).name == recipe.name not in ("", ".."),
        f"name = {recipe.name!r} cannot name a folder in runs/",
    )
    yield recipe.teacher != "", "teacher is empty; set a built-in name, a folder, a file or a hub id"
    yield scenes or data.path != "", f"data.kind = {data.kind.value} needs data.path"
    yield not scenes or data.size == SIZE, f"data.size = {data.size}, but scenes are drawn at {SIZE} pixels"
    yield (
        data.kind in (DataKind.scenes, DataKind.cache) or recipe.evaluate.prompts == 0,
        f"evaluate.prompts must be 0 with data.kind = {data.kind.value}: only scenes can be scored",
    )
    yield recipe.evaluate.prompts != 1, "evaluate.prompts = 1, but FID needs at least 2 (or 0 for no scores)"
    yield (
        distill.consistency.weight > 0 or adversarial.weight > 0,
        "distill.consistency.weight and distill.adversarial.weight are both 0: nothing to train on",
    )
    yield (
        distill.self_consistency == 0 or adversarial.weight > 0,
        "distill.self_consistency looks at LADD's samples, but distill.adversarial.weight is 0; set both to 0",
    )
    taps, scales, steps = list(adversarial.taps), list(distill.guidance_scales), list(recipe.evaluate.steps)
    yield (
        taps == sorted(set(taps)) and all(tap >= 0 for tap in taps),
        f"distill.adversarial.taps = {taps}, but blocks are counted from 0 and listed once, in order",
    )
    yield (
        len(taps) > 0 or adversarial.weight == 0,
        "distill.adversarial.taps is empty, but its weight is not 0",
    )
    yield (
        len(scales) > 0 and all(0 <= scale < math.inf for scale in scales),
        f"distill.guidance_scales = {scales}, but it takes one or more numbers of at least 0",
    )
    yield _own_times(distill.student_times)
    yield (
        len(steps) > 0 and all(1 <= count <= 4 for count in steps),
        f"evaluate.steps = {steps}, but a student takes 1 to 4 steps",
    )


def _own_times(lists: Sequence[Sequence[float]]) -> tuple[bool, str]:
    """Step lists as the student's folder may hold them: at most one for each of 1 to 4 steps."""
    from sprint.maths.schedule import check_times

    key = f"distill.student_times = {[list(times) for times in lists]}"
    try:
        steps = [len(check_times(list(times))) - 1 for times in lists]
    except SprintError as error:
        return False, f"{key}: {error}"
    once = len(set(steps)) == len(steps) and all(count <= 4 for count in steps)
    return once, f"{key}, but it takes one list at most for each of 1 to 4 steps"


def _relations_of_engine(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    engine = recipe.engine
    zero = engine in (EngineKind.zero2, EngineKind.zero3)
    trained = (recipe.adapt.optimizer, recipe.distill.optimizer)
    yield (
        not zero or all(optimizer.kind is OptimizerKind.adamw for optimizer in trained),
        f"engine = {engine.value} hands optimizers flat pieces of weights, and CAME needs whole rows: "
        "use engine=fsdp2, or the adamw optimizer",
    )
    yield (
        recipe.shard_size == 0 or engine is EngineKind.fsdp2,
        f"shard_size = {recipe.shard_size}, but engine = {engine.value} knows none; use engine=fsdp2",
    )
    yield (
        not recipe.compile or engine is not EngineKind.zero3,
        "compile = true, but compiled blocks have not been tried with engine = zero3; use engine=fsdp2",
    )
    yield from ((False, problem) for problem in misfits(recipe, processes=1))
