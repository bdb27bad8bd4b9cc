"""The plan as a page of text: recipe, parameters, memory of its own engine by part, and the totals of all engines."""

from sprint.recipe.load import recipe_hash, recipe_text
from sprint.recipe.schema import Recipe
from sprint.train.plan.engines import RECOMPUTED
from sprint.train.plan.plan import (
    GPU_COUNTS,
    Plan,
    Stage,
    Totals,
    forward_batch,
    local_batch,
    with_totals,
)

GIB = 2**30
TERA = 10**12
SPEED = 100 * TERA  # FLOPs a second: a round number, for the reader to scale
CARDS = (40, 80)  # GiB
SPARE = 0.2  # of the plan, for workspace and fragmentation

NOTES = """\
Weights, gradients, optimizer state: exact; where the engine cuts them, of the process with most.
Whole for a moment: what an engine gathers or buffers while a network is at work, and frees. fsdp2: what is not in
    blocks, two blocks of weights, two of gradients. zero2 and zero3: a bucket; zero3: weights kept for reuse.
Activations: what the highest moment of an update holds on top of the rows above. Until the backward, one
    trained block keeps for each picture width x ({block:g} bytes x image tokens + {text:g} bytes x text tokens).
Stage 2 backpropagates its losses one after the other, and the highest moment of any counts. With LADD that is a pass
    of the student, and the frozen teacher up to its last tap, with the heads; recomputed, it may be the heads' update.
Recomputed (activation_checkpointing): each block keeps its input alone and runs again in the
    backward, one block at a time.
Not counted: text encoder and autoencoder, which add their weights if pictures are encoded while training;
workspace and fragmentation, commonly 10 to 20% on top."""


def page(plan: Plan) -> list[str]:
    """Its lines."""
    recipe, per = plan.recipe, plan.footprint
    lines = [f"# recipe {recipe.name}, hash {recipe_hash(recipe)}", recipe_text(recipe).rstrip(), ""]
    lines += ["# parameters", *(f"{name:<38}{count:>16,}" for name, count in plan.parameters.items())]
    lines += ["", *_work_table(plan)]
    for stage in plan.stages:
        lines += ["", *_memory_table(recipe, stage)]
    if plan.stages:
        lines += ["", *_engines_table(plan)]
    lines += ["", *plan.misfits] if plan.misfits else []
    return [*lines, "", NOTES.format(block=per.block, text=per.block_text)]


def _work_table(plan: Plan) -> list[str]:
    """One row a kind of update; the whole run in GPU hours at a round speed, for the reader to scale."""
    *updates, (_, run) = plan.flops.items()
    hours = run / (SPEED * 3600)
    return [
        "# work: TFLOP for one picture",
        *(f"{name:<38}{flops / TERA:>16,.3f}" for name, flops in updates),
        f"{'the whole run':<38}{run / TERA:>16,.0f}   {hours:,.1f} GPU hours at {SPEED / TERA:g} TFLOP/s",
    ]


def _memory_table(recipe: Recipe, stage: Stage) -> list[str]:
    """One row a part, one column a number of GPUs."""
    columns = [with_totals(parts) for parts in stage.memory.values()]
    forward = [forward_batch(recipe, stage.batch_size, gpus) for gpus in stage.memory]
    return [
        f"# {stage.name}, engine {recipe.engine.value}: GiB on each GPU",
        _row("GPUs", [str(gpus) for gpus in stage.memory]),
        _row("pictures on each", [str(local_batch(stage.batch_size, gpus)) for gpus in stage.memory]),
        _row("pictures in one forward", [str(size) for size in forward]),
        *(_row(name, [f"{parts[name] / GIB:,.2f}" for parts in columns]) for name in columns[0]),
    ]


def _engines_table(plan: Plan) -> list[str]:
    """Two rows an engine, without and with activation checkpointing; one column a number of GPUs."""
    counts = (1, *GPU_COUNTS)
    lines = [
        f"# every engine, the larger stage: GiB on each GPU; (40) or (80): fits such a GPU with {SPARE:.0%} to spare",
        _row("GPUs", [str(gpus) for gpus in counts]),
    ]
    for name, by_gpus in plan.engines.items():
        for ending, which in (("", 0), (RECOMPUTED, 1)):
            lines.append(_row(name + ending, [_cell(by_gpus.get(gpus), which) for gpus in counts]))
    return lines


def _cell(totals: Totals | None, which: int) -> str:
    if totals is None:
        return "-     "
    card = smallest_card(totals[which])
    return f"{totals[which] / GIB:,.1f}" + (f" ({card})" if card else "     ")


def smallest_card(size: float) -> int | None:
    """GiB of the smallest GPU that `size` bytes fit with something to spare, None if they fit none."""
    return next((card for card in CARDS if size * (1 + SPARE) <= card * GIB), None)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<38}" + "".join(f"{cell:>13}" for cell in cells)
