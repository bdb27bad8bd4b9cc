"""The dry run: the real networks on the meta device, their parameters, and what one GPU must hold.

Weights, gradients and optimizer state are counted exactly, in pieces where the engine cuts them. Activations are
planned for the highest moment of an update, from the bytes that a block keeps or works with per token and channel,
measured once on small networks. Tests measure whole updates in one process, where the plan is within 10%.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from sprint.models.depth import depth_words
from sprint.models.teacher import Footprint
from sprint.recipe.schema import EngineKind, Optimizer, OptimizerKind, Precision, Recipe
from sprint.recipe.shares import misfits
from sprint.train.checks import needs_teacher
from sprint.train.plan.activations import BF16, FP32, Update
from sprint.train.plan.engines import (
    BUFFERED,
    CASTS_KEPT,
    COPIES,
    GRADIENTS,
    RECOMPUTED,
    WHOLE,
    ZERO,
    Layout,
    Parts,
    average_bytes,
    count,
    drawing_bytes,
    frozen,
    layout_of,
    trained,
)
from sprint.train.plan.networks import Networks, build_networks, fake_score_of
from sprint.train.plan.work import drawn, flops_of

GPU_COUNTS = (8, 32, 256)

BATCH, TRAJECTORIES, DRAWS = "texts and latents", "trajectories", "teacher that draws"
ACTIVATIONS = {"activations": False, f"activations{RECOMPUTED}": True}  # rows: activation checkpointing
ENGINES = {  # rows of the table of totals, with what they set in the recipe
    "single": (EngineKind.single, False),
    "ddp": (EngineKind.ddp, False),
    "fsdp2": (EngineKind.fsdp2, False),
    "fsdp2, teacher too": (EngineKind.fsdp2, True),
    "zero2, AdamW": (EngineKind.zero2, False),
    "zero3, AdamW": (EngineKind.zero3, False),
}


@dataclass(frozen=True)
class Stage:
    """memory: bytes by number of GPUs and part, each GPU with its share of the global batch."""

    name: str
    batch_size: int
    memory: dict[int, Parts]


class Totals(NamedTuple):
    """Bytes, without and with activation checkpointing."""

    kept: float
    recomputed: float


@dataclass(frozen=True)
class Plan:
    """What a run is and needs; `sprint.train.plan.page` prints it."""

    recipe: Recipe
    parameters: dict[str, int]  # by network
    stages: list[Stage]
    engines: dict[str, dict[int, Totals]]  # by row of `ENGINES` and number of GPUs, the larger of the stages
    misfits: list[str]  # numbers of GPUs that the recipe cannot have, and why
    footprint: Footprint  # bytes of a block, as activations were planned
    flops: dict[str, float]  # of one picture by kind of update, and of the run


def dry_run(recipe: Recipe) -> Plan:
    """Plan a run without its weights and without the network.

    Raises `SprintError` if the teacher is neither on disk nor named by `arch`, or the recipe does not fit it.
    """
    networks = build_networks(recipe)
    of_student = depth_words(networks.student_depth, networks.sizes.depth) or "guidance embedder, logvar"
    parameters = {
        "teacher": count(networks.teacher),
        "adapted teacher (QK-norm)": count(networks.adapted),
        f"student ({of_student})": count(networks.student),
    }
    if recipe.distill.adversarial.weight > 0:
        parameters[f"discriminator heads ({len(networks.heads.heads)})"] = count(networks.heads)
    if recipe.distill.matching.weight > 0:
        parameters["fake score, trained"] = count(fake_score_of(recipe, networks))
    return Plan(
        recipe=recipe,
        parameters=parameters,
        stages=stages_of(recipe, networks, gpu_counts(recipe.engine)),
        engines={row: totals(with_engine(recipe, *engine), networks) for row, engine in engines_for(recipe)},
        misfits=gpu_misfits(recipe),
        footprint=networks.family.footprints[recipe.precision],
        flops=flops_of(recipe, networks),
    )


def engines_for(recipe: Recipe) -> list[tuple[str, tuple[EngineKind, bool]]]:
    """Rows of `ENGINES` that the recipe can have: additions to the teacher stand on its whole weights."""
    whole = recipe.distill.matching.weight > 0 and recipe.distill.matching.lora_rank > 0
    return [(row, engine) for row, engine in ENGINES.items() if not (whole and engine[1])]


def gpu_counts(engine: EngineKind) -> tuple[int, ...]:
    return (1,) if engine is EngineKind.single else GPU_COUNTS


def stages_of(recipe: Recipe, networks: Networks, gpu_counts: tuple[int, ...]) -> list[Stage]:
    """The stages that the recipe takes, with their memory under its engine."""
    adapt, distill, stages = recipe.adapt, recipe.distill, []
    if adapt.steps > 0:
        memory = {gpus: adapt_memory(recipe, networks, gpus) for gpus in gpu_counts}
        stages.append(Stage("stage 1, adapt", adapt.batch_size, memory))
    if distill.steps > 0:
        memory = {gpus: distill_memory(recipe, networks, gpus) for gpus in gpu_counts}
        stages.append(Stage("stage 2, distill", distill.batch_size, memory))
    return stages


def totals(recipe: Recipe, networks: Networks) -> dict[int, Totals]:
    """By number of GPUs, of the stage that needs more."""
    counts = gpu_counts(recipe.engine)
    stages = stages_of(recipe, networks, counts)
    sums = {gpus: [totals_of(stage.memory[gpus]) for stage in stages] for gpus in counts}
    return {gpus: Totals(*map(max, zip(*each, strict=True))) for gpus, each in sums.items() if each}


def with_engine(recipe: Recipe, engine: EngineKind, shard_teacher: bool) -> Recipe:
    """The recipe under another engine. ZeRO takes AdamW only, so there the networks get it."""

    def optimizer(settings: Optimizer) -> Optimizer:
        return replace(settings, kind=OptimizerKind.adamw) if zero else settings

    zero = engine in ZERO
    adapt = replace(recipe.adapt, optimizer=optimizer(recipe.adapt.optimizer))
    matching = replace(recipe.distill.matching, optimizer=optimizer(recipe.distill.matching.optimizer))
    distill = replace(recipe.distill, optimizer=optimizer(recipe.distill.optimizer), matching=matching)
    return replace(recipe, engine=engine, shard_teacher=shard_teacher, adapt=adapt, distill=distill)


def gpu_misfits(recipe: Recipe) -> list[str]:
    """Where a batch does not divide over the GPUs, or the share of one into neighbours."""
    return [
        f"{gpus} GPUs: {problem}" for gpus in gpu_counts(recipe.engine) for problem in misfits(recipe, gpus)
    ]


# ---- memory of one GPU ------------------------------------------------------------------------------


def adapt_memory(recipe: Recipe, networks: Networks, gpus: int) -> Parts:
    """Bytes by part in stage 1."""
    settings = recipe.adapt
    parts = trained(networks.adapted, settings.optimizer.kind, recipe.precision, layout_of(recipe, gpus))
    parts[BATCH] = _batch_bytes(recipe, networks, local_batch(settings.batch_size, gpus))
    draws, _ = drawn(recipe)
    if draws:
        parts[DRAWS] = drawing_bytes(networks.teacher, recipe)
    for row, recomputed in ACTIVATIONS.items():
        update = _update(recipe, networks, networks.sizes.depth, settings.batch_size, gpus, parts, recomputed)
        parts[row] = max(update.flow() + (update.drawing(update.pictures) if draws else []))
    return parts


def distill_memory(recipe: Recipe, networks: Networks, gpus: int) -> Parts:
    """Bytes by part in stage 2, at the highest moment of any update."""
    distill, adversarial = recipe.distill, recipe.distill.adversarial
    consistent, adverse = distill.consistency.weight > 0, adversarial.weight > 0
    states, (_, draws) = distill.trajectories.states, drawn(recipe)
    matched = distill.matching.weight > 0
    layout = layout_of(recipe, gpus)
    parts = trained(networks.student, distill.optimizer.kind, recipe.precision, layout)
    if distill.ema_decay > 0:
        parts["EMA (fp32)"] = average_bytes(networks.student, layout)
    if needs_teacher(distill):
        parts |= frozen(networks.adapted, recipe, gpus)
    if draws:
        parts[DRAWS] = drawing_bytes(networks.teacher, recipe)
    if adverse:  # heads are whole everywhere
        heads = trained(networks.heads, adversarial.optimizer.kind, recipe.precision, Layout())
        parts["heads, with optimizer"] = sum(heads.values())
    if matched:
        parts["fake score, with optimizer"] = fake_score_bytes(recipe, networks, layout)
    parts[BATCH] = _batch_bytes(recipe, networks, local_batch(distill.batch_size, gpus))
    if states:
        parts[TRAJECTORIES] = _trajectory_bytes(recipe, networks, local_batch(distill.batch_size, gpus))
    reads = distill.batch_size // (states or 1)
    for row, recomputed in ACTIVATIONS.items():
        update = _update(
            recipe, networks, networks.student_depth, distill.batch_size, gpus, parts, recomputed
        )
        moments = update.drawing(forward_batch(recipe, reads, gpus)) if draws else []
        if consistent:
            moments += update.stored(tangent=True, first=True) if states else update.consistency()
        elif distill.regression > 0:
            moments += update.stored(tangent=False, first=True)
        first = not consistent and distill.regression == 0
        if matched:
            sums = sums_bytes(recipe, networks, recomputed)
            moments += update.matching(first)
            moments += replace(update, depth=networks.sizes.depth).fake_score(sums)
        first = first and not matched
        moments += update.adversarial(first) + update.discriminator() if adverse else []
        parts[row] = max(moments)
    return parts


def fake_score_bytes(recipe: Recipe, networks: Networks, layout: Layout) -> float:
    """Of the fake score, as the student is held, or whole everywhere if it is additions to the teacher."""
    matching = recipe.distill.matching
    cut = layout if matching.lora_rank == 0 else Layout()
    own = fake_score_of(recipe, networks)
    parts = trained(own, matching.optimizer.kind, recipe.precision, cut)
    of_a_moment = (
        WHOLE,
        COPIES,
        COPIES + RECOMPUTED,
    )  # the student's stand for both: one of them is trained at a time
    return sum(size for name, size in parts.items() if name not in of_a_moment)


def sums_bytes(recipe: Recipe, networks: Networks, recomputed: bool) -> float:
    """Of weights with what is added to them, which a pass makes and keeps for its backward; none of a whole network."""
    blocks = networks.family.blocks(networks.adapted)
    size = BF16 if recipe.precision is Precision.bf16 else FP32
    return size * count(blocks[0] if recomputed else blocks) if recipe.distill.matching.lora_rank else 0


def _update(
    recipe: Recipe,
    networks: Networks,
    depth: int,
    batch_size: int,
    gpus: int,
    parts: Parts,
    recomputed: bool,
) -> Update:
    """depth: blocks of what the stage trains"""
    pictures = forward_batch(recipe, batch_size, gpus)
    there_before = recipe.engine in BUFFERED or pictures < local_batch(batch_size, gpus)
    one_block_cast = recomputed and recipe.engine not in CASTS_KEPT  # its copies may come at any moment
    return Update(
        per=networks.family.footprints[recipe.precision],
        precision=recipe.precision,
        recomputed=recomputed,
        pictures=pictures,
        width=networks.sizes.width,
        depth=depth,
        teacher_depth=networks.sizes.depth,
        tokens=networks.tokens,
        text_tokens=recipe.text.max_length,
        text_width=networks.sizes.text_width,
        taps=tuple(recipe.distill.adversarial.taps),
        kinds=recipe.distill.adversarial.looks,
        copies=0 if one_block_cast else parts.get(COPIES, 0),
        first_gradients=0 if there_before else parts[GRADIENTS],
    )


def local_batch(batch_size: int, gpus: int) -> int:
    """A process's share of a batch."""
    return math.ceil(batch_size / gpus)


def forward_batch(recipe: Recipe, batch_size: int, gpus: int) -> int:
    """Pictures in one forward: a process's share of the batch, or a micro-batch of it."""
    local = local_batch(batch_size, gpus)
    return min(local, recipe.micro_batch_size or local)


def _batch_bytes(recipe: Recipe, networks: Networks, pictures: int) -> int:
    """Embedded prompts, latents and up to three draws of noise."""
    text = networks.sizes.text_width * recipe.text.max_length
    return FP32 * pictures * (text + 4 * networks.latent_numel)


def _trajectory_bytes(recipe: Recipe, networks: Networks, pictures: int) -> float:
    """States and velocities of the samples, and of the whole trajectories from which they are chosen, with texts."""
    path, text = recipe.distill.trajectories, networks.sizes.text_width * recipe.text.max_length
    whole = text + (1 + 2 * path.steps) * networks.latent_numel
    return FP32 * pictures * (2 * networks.latent_numel + whole / path.states)


def with_totals(parts: Parts) -> Parts:
    """The same and their sums, without and with activation checkpointing."""
    kept, recomputed = totals_of(parts)
    return {**parts, "total": kept, f"total{RECOMPUTED}": recomputed}


def totals_of(parts: Parts) -> Totals:
    kept = sum(size for name, size in parts.items() if not name.endswith(RECOMPUTED))
    recomputed = sum(size for name, size in parts.items() if name + RECOMPUTED not in parts)
    return Totals(kept, recomputed)
