"""What a recipe's values must be: each in the range that its field names, then what must hold between them."""

import os
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path

from sprint.base.door import shown
from sprint.base.errors import SprintError
from sprint.lab.scenes import SIZE
from sprint.maths.schedule import check_times
from sprint.recipe.kinds import kind_of
from sprint.recipe.schema import Data, DataKind, Distill, EngineKind, Optimizer, OptimizerKind, Recipe
from sprint.recipe.settings import GUIDANCE, each_setting, kinds, takes
from sprint.recipe.shares import misfits

_OPTIMIZERS = (
    *("adapt.optimizer", "distill.optimizer", "distill.adversarial.optimizer"),
    "distill.matching.optimizer",
)


def validate(recipe: Recipe) -> None:
    """Raise a `SprintError` that names the first key whose value cannot work, and what would."""
    problem = next(_problems(recipe), None)
    if problem:
        raise SprintError(f"recipe {recipe.name}: {problem}")


def check_betas(optimizer: Optimizer, key: str = "optimizer") -> None:
    """Raise a `SprintError` where the optimizer does not take so many betas, or not such ones."""
    count, betas = optimizer.kind.betas, list(optimizer.betas)
    if len(betas) != count or not all(0 <= beta < 1 for beta in betas):
        kind = optimizer.kind.value
        raise SprintError(f"{key}.betas = {betas}, but {kind} takes {count} numbers in [0, 1)")


def _problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong, a sentence each. Later checks rely on the earlier ones: only the first sentence is sure."""
    yield from out_of_range(recipe)
    for key in _OPTIMIZERS:
        try:
            check_betas(attrgetter(key)(recipe), key)
        except SprintError as error:
            yield str(error)
    yield from _of_trajectories(recipe)
    yield from _of_engine(recipe)
    if Path(recipe.name).name != recipe.name or recipe.name in ("", ".."):
        yield f"name = {recipe.name!r} cannot name a folder in runs/"
    if not recipe.teacher:
        yield "teacher is empty; set a built-in name, a folder, a file or a hub id"
    yield from _of_data(recipe.data)
    yield from _of_distill(recipe.distill)
    yield from _of_evaluation(recipe)


def out_of_range(group: object, prefix: str = "") -> Iterator[str]:
    """Of a recipe, or of a group of it: each number that its field does not take."""
    for key, field, value in each_setting(group, prefix):
        allowed = takes(field)
        if allowed and not allowed.holds(value):
            yield f"{key} = {shown(value, 40)}, but it must be {allowed.words}"


def _of_engine(recipe: Recipe) -> Iterator[str]:
    engine = recipe.engine
    zero = engine in (EngineKind.zero2, EngineKind.zero3)
    matching, cut = recipe.distill.matching, ["adapt.optimizer", "distill.optimizer"]
    if matching.weight > 0 and matching.lora_rank == 0:
        cut.append("distill.matching.optimizer")
    came = [key for key in cut if attrgetter(key)(recipe).kind is OptimizerKind.came]
    if zero and came:
        yield (
            f"engine = {engine.value} hands optimizers flat pieces of weights, and CAME needs whole rows: "
            f"use engine=fsdp2, or the adamw optimizer in {', '.join(came)}"
        )
    if recipe.shard_size > 0 and engine is not EngineKind.fsdp2:
        yield f"shard_size = {recipe.shard_size}, but engine = {engine.value} knows none; use engine=fsdp2"
    if matching.weight > 0 and matching.lora_rank > 0 and recipe.shard_teacher:
        yield (
            "distill.matching.lora_rank > 0 stands on the teacher's whole weights, and shard_teacher = true cuts them: "
            "set lora_rank to 0, or shard_teacher to false"
        )
    if recipe.compile and engine is EngineKind.zero3:
        yield "compile = true, but compiled blocks have not been tried with engine = zero3; use engine=fsdp2"
    yield from misfits(recipe, processes=1)


def _of_data(data: Data) -> Iterator[str]:
    if data.kind is DataKind.scenes and data.size != SIZE:
        yield f"data.size = {data.size}, but scenes are drawn at {SIZE} pixels"
    if data.kind is not DataKind.scenes and not data.path:
        yield f"data.kind = {data.kind.value} needs data.path"
    if data.kind is DataKind.scenes and data.path:
        yield f"data.path = {shown(data.path)}, but scenes are drawn and read no path; {_what_it_looks_like(data.path)}"
    for key, field, value in each_setting(data, "data."):
        if kinds(field) and data.kind.value not in kinds(field) and value != field.default:
            yield (
                f"{key} = {shown(value)}, but data.kind = {data.kind.value} does not read it "
                f"(only {', '.join(kinds(field))}); set data.kind, or leave it at {field.default}"
            )


def _what_it_looks_like(path: str) -> str:
    kind = kind_of(path)
    if kind is None:
        others = ", ".join(kind.value for kind in DataKind if kind is not DataKind.scenes)
        there = "" if os.path.lexists(path) else "nothing is there, and "
        return f"{there}data.kind must say what it holds: {others}"
    there = (
        "a dataset's name on the hub"
        if kind is DataKind.huggingface and not os.path.exists(path)
        else kind.value
    )
    return f"it looks like {there}: set data.kind={kind.value}"


def _of_distill(distill: Distill) -> Iterator[str]:
    adversarial, matching = distill.adversarial, distill.matching
    taps, scales = list(adversarial.taps), list(distill.guidance_scales)
    if distill.consistency.weight == 0 and matching.weight == 0 and distill.regression == 0:
        if adversarial.weight == 0:
            yield (
                "the weights of distill.consistency, adversarial and matching and distill.regression are all 0: "
                "nothing to train on"
            )
        elif adversarial.warmup_steps > 0 and distill.self_consistency == 0:
            yield (
                f"distill.adversarial.warmup_steps = {adversarial.warmup_steps}, but there is no other term to "
                "train on meanwhile; set it to 0"
            )
    if distill.self_consistency > 0 and adversarial.weight == 0:
        yield (
            "distill.self_consistency looks at LADD's samples, but distill.adversarial.weight is 0; "
            "set both to 0"
        )
    if taps != sorted(set(taps)) or any(tap < 0 for tap in taps):
        yield f"distill.adversarial.taps = {shown(taps)}, but blocks are counted from 0 and listed once, in order"
    if adversarial.weight > 0 and not taps:
        yield "distill.adversarial.taps is empty, but its weight is not 0"
    if not scales or not all(map(GUIDANCE.holds, scales)):
        yield f"distill.guidance_scales = {shown(scales)}, but it takes one or more numbers {GUIDANCE.words}"
    yield from _of_times(distill.student_times)


def _of_trajectories(recipe: Recipe) -> Iterator[str]:
    distill, path = recipe.distill, recipe.distill.trajectories
    if distill.regression > 0 and not path.states:
        yield (
            f"distill.regression = {distill.regression}, but it looks at states of trajectories, and "
            "distill.trajectories.states is 0; set that to 1 or more"
        )
    if not path.states:
        return
    if path.states > path.steps:
        yield (
            f"distill.trajectories.states = {path.states}, but a trajectory of distill.trajectories.steps = "
            f"{path.steps} has {path.steps}; use fewer, or more steps"
        )
    if distill.batch_size % path.states:
        yield (
            f"distill.batch_size = {distill.batch_size} is no multiple of distill.trajectories.states = "
            f"{path.states}, of which each trajectory gives so many"
        )
    if recipe.data.aspect_buckets:
        yield "data.aspect_buckets = true, but trajectories lead to square pictures"


def _of_times(lists: Sequence[Sequence[float]]) -> Iterator[str]:
    """Step lists as the student's folder may hold them: at most one for each of 1 to 4 steps."""
    key = f"distill.student_times = {[list(times) for times in lists]}"
    try:
        steps = [len(check_times(list(times))) - 1 for times in lists]
    except SprintError as error:
        yield f"{key}: {error}"
        return
    if len(set(steps)) != len(steps) or any(count > 4 for count in steps):
        yield f"{key}, but it takes one list at most for each of 1 to 4 steps"


def _of_evaluation(recipe: Recipe) -> Iterator[str]:
    prompts, steps = recipe.evaluate.prompts, list(recipe.evaluate.steps)
    if prompts == 1 and recipe.data.kind is DataKind.scenes:
        yield "evaluate.prompts = 1, but FID needs at least 2 (or 0 for no scores)"
    if not steps or not all(1 <= count <= 4 for count in steps):
        yield f"evaluate.steps = {shown(steps)}, but a student takes 1 to 4 steps"
