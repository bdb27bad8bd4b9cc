"""The dry run: the real networks on the meta device, their parameters, and what one GPU must hold.

Weights, gradients and optimizer state are counted exactly. Activations are planned for the highest moment of
an update, from the bytes that a block keeps or works with per token and channel, measured once on small
networks. Tests measure whole updates, where the plan is within 10%.
Every GPU holds everything (data parallel); only the batch is split.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from torch import nn

from sprint.activations import BF16, FOOTPRINTS, FP32, Update
from sprint.convert.checkpoint import understand
from sprint.errors import SprintError
from sprint.models.family import resolve
from sprint.models.heads import DiscriminatorHeads
from sprint.models.presets import QK_NORM, meta_network, transformer_config
from sprint.recipe import OptimizerKind, Precision, Recipe, recipe_hash, recipe_text

GPU_COUNTS = (1, 8, 32)
DC_AE_DOWNSCALE = 32  # pixels per latent cell, unless the teacher's own autoencoder is on disk

Shapes = list[torch.Size]
Parts = dict[str, float]  # bytes by name


GRADIENTS, COPIES, BATCH = "gradients (fp32)", "bf16 copies", "texts and latents"
ACTIVATIONS = {"activations": False, "activations, recomputed": True}  # rows: activation checkpointing


@dataclass(frozen=True)
class Networks:
    """What a run trains and uses, on the meta device."""

    teacher: SanaTransformer2DModel
    adapted: SanaTransformer2DModel
    student: nn.ModuleDict  # the network and its logvar head
    heads: DiscriminatorHeads
    tokens: int  # latent cells that the network sees
    latent_numel: int  # numbers in the latent of one picture
    width: int

    @property
    def depth(self) -> int:
        return len(self.teacher.transformer_blocks)


@dataclass(frozen=True)
class Stage:
    """memory: bytes by number of GPUs and part, each GPU with its share of the global batch."""

    name: str
    batch_size: int
    memory: dict[int, Parts]


@dataclass(frozen=True)
class Plan:
    """What a run is and needs; `str(plan)` is the page that --dry-run prints."""

    recipe: Recipe
    parameters: dict[str, int]  # by network
    stages: list[Stage]

    def __str__(self) -> str:
        return "\n".join(_page(self))


def dry_run(recipe: Recipe) -> Plan:
    """Plan a run without its weights and without the network.

    Raises `SprintError` if the teacher is neither on disk nor named by `arch`, or the recipe does not fit it.
    """
    networks = build_networks(recipe)
    adapt, distill = recipe.adapt, recipe.distill
    parameters = {
        "teacher": _count(networks.teacher),
        "adapted teacher (QK-norm)": _count(networks.adapted),
        "student (guidance embedder, logvar)": _count(networks.student),
    }
    if distill.adversarial.weight > 0:
        parameters[f"discriminator heads ({len(networks.heads.heads)})"] = _count(networks.heads)
    stages = []
    if adapt.steps > 0:
        memory = {gpus: adapt_memory(recipe, networks, gpus) for gpus in GPU_COUNTS}
        stages.append(Stage("stage 1, adapt", adapt.batch_size, memory))
    if distill.steps > 0:
        memory = {gpus: distill_memory(recipe, networks, gpus) for gpus in GPU_COUNTS}
        stages.append(Stage("stage 2, distill", distill.batch_size, memory))
    return Plan(recipe, parameters, stages)


# ---- the networks -----------------------------------------------------------------------------------


def build_networks(recipe: Recipe) -> Networks:
    """Teacher, adapted teacher, student and heads of a recipe, on the meta device."""
    config = teacher_config(recipe)
    check_taps(recipe, config["num_layers"])
    return networks_of(config, len(recipe.distill.adversarial.taps), _tokens(recipe, config["patch_size"]))


def networks_of(config: dict, taps: int, tokens: int) -> Networks:
    """The networks of a teacher with this `config`, on the meta device. tokens: latent cells of a picture"""
    adapted = {**config, "qk_norm": QK_NORM}
    width = config["num_attention_heads"] * config["attention_head_dim"]
    student = meta_network({**adapted, "guidance_embeds": True})
    with torch.device("meta"):
        logvar, heads = nn.Linear(width, 1), DiscriminatorHeads(width, taps)
    return Networks(
        teacher=meta_network(config),
        adapted=meta_network(adapted),
        student=nn.ModuleDict({"network": student, "logvar": logvar}),
        heads=heads,
        tokens=tokens,
        latent_numel=config["in_channels"] * tokens * config["patch_size"] ** 2,
        width=width,
    )


def teacher_config(recipe: Recipe) -> dict:
    """The teacher's architecture: from its files if they are on disk, else the preset named by `arch`."""
    path = Path(resolve(recipe.teacher)).expanduser()
    if not path.exists():
        if not recipe.arch:
            raise SprintError(
                f"{recipe.teacher}: not on disk; for a dry run without it, set arch=0.6b (or 1.6b, 4.8b)"
            )
        return transformer_config(recipe.arch)
    config = understand(path).config
    if config["guidance_embeds"]:
        raise SprintError(f"{recipe.teacher} is a student (it embeds guidance); a teacher is needed here")
    check_arch(recipe, config)
    return config


def check_taps(recipe: Recipe, depth: int) -> None:
    """Raise a `SprintError` if the discriminator taps a block that a teacher of `depth` blocks has not."""
    taps = list(recipe.distill.adversarial.taps)
    if recipe.distill.adversarial.weight > 0 and any(tap >= depth for tap in taps):
        raise SprintError(f"distill.adversarial.taps = {taps}, but the teacher's blocks are 0 to {depth - 1}")


def check_arch(recipe: Recipe, config: dict) -> None:
    """Raise a `SprintError` if the recipe says `arch` and the teacher, by its config, has another size."""
    if not recipe.arch:
        return
    expected = transformer_config(recipe.arch)
    for key in ("num_layers", "num_attention_heads", "attention_head_dim"):
        if config[key] != expected[key]:
            raise SprintError(
                f"arch = {recipe.arch} has {key} = {expected[key]}, but {recipe.teacher} has {config[key]}"
            )


def _tokens(recipe: Recipe, patch_size: int) -> int:
    config = Path(resolve(recipe.teacher_family or recipe.teacher)) / "vae" / "config.json"
    downscale = DC_AE_DOWNSCALE
    if config.is_file():
        downscale = 2 ** (len(json.loads(config.read_text())["encoder_block_out_channels"]) - 1)
    cell = downscale * patch_size
    if recipe.data.size % cell:
        raise SprintError(f"data.size = {recipe.data.size}, but it must be a multiple of {cell}")
    return (recipe.data.size // cell) ** 2


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- memory of one GPU ------------------------------------------------------------------------------


def adapt_memory(recipe: Recipe, networks: Networks, gpus: int) -> Parts:
    """Bytes by part in stage 1."""
    settings = recipe.adapt
    parts = _trained(networks.adapted, settings.optimizer.kind, recipe.precision)
    parts[BATCH] = _batch_bytes(recipe, networks, _local_batch(settings.batch_size, gpus))
    for row, recomputed in ACTIVATIONS.items():
        update = _update(recipe, networks, settings.batch_size, gpus, parts, recomputed)
        parts[row] = max(update.flow())
    return parts


def distill_memory(recipe: Recipe, networks: Networks, gpus: int) -> Parts:
    """Bytes by part in stage 2, at the highest moment of either update."""
    distill, adversarial = recipe.distill, recipe.distill.adversarial
    consistent, adverse = distill.consistency.weight > 0, adversarial.weight > 0
    parts = _trained(networks.student, distill.optimizer.kind, recipe.precision)
    if distill.ema_decay > 0:
        parts["EMA (fp32)"] = FP32 * _count(networks.student)
    parts["frozen teacher"] = _compute_bytes(recipe.precision) * _count(networks.adapted)
    if adverse:
        heads = _trained(networks.heads, adversarial.optimizer.kind, recipe.precision)
        parts["heads, with optimizer"] = sum(heads.values())
    parts[BATCH] = _batch_bytes(recipe, networks, _local_batch(distill.batch_size, gpus))
    for row, recomputed in ACTIVATIONS.items():
        update = _update(recipe, networks, distill.batch_size, gpus, parts, recomputed)
        moments = update.consistency() if consistent else []
        moments += update.adversarial(first=not consistent) + update.discriminator() if adverse else []
        parts[row] = max(moments)
    return parts


def _update(
    recipe: Recipe, networks: Networks, batch_size: int, gpus: int, parts: Parts, recomputed: bool
) -> Update:
    pictures = _forward_batch(recipe, batch_size, gpus)
    accumulated = pictures < _local_batch(batch_size, gpus)
    return Update(
        precision=recipe.precision,
        recomputed=recomputed,
        pictures=pictures,
        width=networks.width,
        depth=networks.depth,
        tokens=networks.tokens,
        text_tokens=recipe.text.max_length,
        caption_channels=networks.teacher.config.caption_channels,
        taps=tuple(recipe.distill.adversarial.taps),
        kinds=2 + recipe.distill.adversarial.misaligned_pairs,
        copies=parts.get(COPIES, 0),
        first_gradients=0 if accumulated else parts[GRADIENTS],
    )


def _trained(module: nn.Module, kind: OptimizerKind, precision: Precision) -> Parts:
    """fp32 weights, their gradients and optimizer state, and the bf16 copies that autocast makes."""
    count = _count(module)
    state = optimizer_state_numel([p.shape for p in module.parameters()], kind)
    parts = {
        "weights (fp32)": FP32 * count,
        GRADIENTS: FP32 * count,
        f"optimizer state ({kind.value}, fp32)": FP32 * state,
    }
    if precision is Precision.bf16:
        parts[COPIES] = BF16 * count
    return parts


def optimizer_state_numel(shapes: Shapes, kind: OptimizerKind) -> int:
    """Numbers an optimizer keeps. AdamW: two per weight. CAME: one, and two factored statistics."""
    if kind is OptimizerKind.adamw:
        return sum(2 * shape.numel() for shape in shapes)
    return sum(_came_state_numel(shape) for shape in shapes)


def _came_state_numel(shape: torch.Size) -> int:
    if len(shape) < 2:
        return 2 * shape.numel()  # vectors are not factored
    rows, columns = shape[0], shape[1:].numel()
    return rows * columns + 2 * (rows + columns)


def _local_batch(batch_size: int, gpus: int) -> int:
    return math.ceil(batch_size / gpus)


def _forward_batch(recipe: Recipe, batch_size: int, gpus: int) -> int:
    """Pictures in one forward: a process's share of the batch, or a micro-batch of it."""
    local = _local_batch(batch_size, gpus)
    return min(local, recipe.micro_batch_size or local)


def _batch_bytes(recipe: Recipe, networks: Networks, pictures: int) -> int:
    """Embedded prompts, latents and up to three draws of noise."""
    text = networks.teacher.config.caption_channels * recipe.text.max_length
    return FP32 * pictures * (text + 4 * networks.latent_numel)


def _compute_bytes(precision: Precision) -> int:
    return BF16 if precision is Precision.bf16 else FP32


# ---- the page ---------------------------------------------------------------------------------------

NOTES = """\
Weights, gradients, optimizer state: exact, and the same on every GPU (data parallel, no sharding).
Activations: what the highest moment of an update holds on top of the rows above. Until the backward, one
    trained block keeps for each picture width x ({block:g} bytes x image tokens + {text:g} bytes x text tokens).
Stage 2 backpropagates its two losses one after the other. The second is the higher: a pass of the student, and
    the frozen teacher up to its last tap, with the heads. With activations recomputed it may be the heads' update.
Recomputed (activation_checkpointing): each block keeps its input alone and runs again in the
    backward, one block at a time.
Not counted: text encoder and autoencoder, which add their weights if pictures are encoded while training;
workspace and fragmentation, commonly 10 to 20% on top."""


def _page(plan: Plan) -> list[str]:
    recipe, per = plan.recipe, FOOTPRINTS[plan.recipe.precision]
    lines = [f"# recipe {recipe.name}, hash {recipe_hash(recipe)}", recipe_text(recipe).rstrip(), ""]
    lines += ["# parameters", *(f"{name:<38}{count:>16,}" for name, count in plan.parameters.items())]
    for stage in plan.stages:
        lines += ["", *_memory_table(recipe, stage)]
    return [*lines, "", NOTES.format(block=per.block, text=per.block_text)]


def _memory_table(recipe: Recipe, stage: Stage) -> list[str]:
    """One row a part, one column a number of GPUs."""
    columns = [with_totals(parts) for parts in stage.memory.values()]
    forward = [_forward_batch(recipe, stage.batch_size, gpus) for gpus in stage.memory]
    return [
        f"# {stage.name}: GiB on each GPU",
        _row("GPUs", [str(gpus) for gpus in stage.memory]),
        _row("pictures on each", [str(_local_batch(stage.batch_size, gpus)) for gpus in stage.memory]),
        _row("pictures in one forward", [str(size) for size in forward]),
        *(_row(name, [f"{parts[name] / 2**30:,.2f}" for parts in columns]) for name in columns[0]),
    ]


def with_totals(parts: Parts) -> Parts:
    """The same and their sums, without and with activation checkpointing."""
    state = sum(size for name, size in parts.items() if not name.startswith("activations"))
    return {
        **parts,
        "total": state + parts["activations"],
        "total, recomputed": state + parts["activations, recomputed"],
    }


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<38}" + "".join(f"{cell:>12}" for cell in cells)
