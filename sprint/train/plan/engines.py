"""What one process holds of a network under each engine, without building it or starting any process.

Pieces are counted tensor by tensor, as the engines cut them, for the process with most. On top comes what is whole
for a moment while a network is at work; an engine frees it again, but it is there when memory is highest.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from sprint.engine.zero import BUCKET, LIVE
from sprint.models.families import family_of, networks_in
from sprint.recipe.schema import EngineKind, OptimizerKind, Precision, Recipe
from sprint.train.plan.activations import BF16, FP32

Parts = dict[str, float]  # bytes by name

# With activation checkpointing, the row "NAME, recomputed" stands in for the row NAME.
RECOMPUTED = ", recomputed"
WEIGHTS, GRADIENTS, COPIES, WHOLE = "weights (fp32)", "gradients (fp32)", "bf16 copies", "whole for a moment"
# DeepSpeed updates an fp32 copy of its own, though the weights are fp32 already
ZERO_COPY = "DeepSpeed's own weights (fp32)"
# weights are whole, so autocast casts each once and keeps the bf16 copy for the rest of the pass
CASTS_KEPT = (EngineKind.single, EngineKind.ddp, EngineKind.zero2)
ZERO = (EngineKind.zero2, EngineKind.zero3)
BUFFERED = (EngineKind.ddp, EngineKind.zero3)  # gradients live in buffers that are never freed


@dataclass(frozen=True)
class Layout:
    """pieces: processes that hold one copy of what `engine` cuts between them; 1 where it cuts nothing"""

    engine: EngineKind = EngineKind.single
    pieces: int = 1

    @property
    def weights_cut(self) -> bool:
        return self.engine in (EngineKind.fsdp2, EngineKind.zero3)

    def piece(self, shapes: Iterable[torch.Size]) -> int:
        """Numbers of these tensors in the largest piece: rows, a share of all in one line, or shares of each."""
        if self.engine is EngineKind.fsdp2:
            return sum(rows_of(shape, self.pieces).numel() for shape in shapes)
        if self.engine is EngineKind.zero2:
            pairs = sum(shape.numel() for shape in shapes) / 2  # DeepSpeed aligns pieces to pairs of numbers
            return 2 * math.ceil(pairs / self.pieces)
        return sum(math.ceil(shape.numel() / self.pieces) for shape in shapes)  # single and ddp: one piece


def layout_of(recipe: Recipe, gpus: int) -> Layout:
    """Of the trained network, with `gpus` processes; one has nobody to share with."""
    if gpus == 1:
        return Layout()
    if recipe.engine in (EngineKind.single, EngineKind.ddp):
        return Layout(recipe.engine)
    return Layout(recipe.engine, _shards(recipe, gpus))


def rows_of(shape: torch.Size, pieces: int) -> torch.Size:
    """The largest piece of a tensor cut along its first axis, as torch's `Shard(0)` cuts."""
    return torch.Size((math.ceil(shape[0] / pieces), *shape[1:]))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def trained(module: nn.Module, kind: OptimizerKind, precision: Precision, layout: Layout) -> Parts:
    """fp32 weights, gradients and optimizer state as the engine cuts them, autocast's copies, and what is whole."""
    shapes = [p.shape for p in module.parameters()]
    piece = layout.piece(shapes)
    parts = {
        WEIGHTS: FP32 * (piece if layout.weights_cut else count(module)),
        GRADIENTS: FP32 * piece,
        f"optimizer state ({kind.value}, fp32)": FP32 * _state_numel(shapes, kind, layout),
    }
    if layout.engine in ZERO:
        parts[ZERO_COPY] = FP32 * piece
    if whole := FP32 * _whole_numel(module, layout):
        parts[WHOLE] = whole
    if precision is Precision.bf16:
        parts[COPIES] = BF16 * count(module)
        if layout.engine not in CASTS_KEPT:
            parts[COPIES + RECOMPUTED] = BF16 * _block_numel(module)  # else the graph keeps them all
    return parts


def average_bytes(module: nn.Module, layout: Layout) -> int:
    """Of a moving average, held as the weights are."""
    return FP32 * (
        layout.piece(p.shape for p in module.parameters()) if layout.weights_cut else count(module)
    )


def drawing_bytes(network: nn.Module, recipe: Recipe) -> int:
    """The teacher as it was, whole in every process, in the precision of the run."""
    return count(network) * (BF16 if recipe.precision is Precision.bf16 else FP32)


def frozen(network: nn.Module, recipe: Recipe, gpus: int) -> Parts:
    """The frozen teacher: in bf16 but for its time embedder, if the run is; in rows if it is sharded."""
    exact = list(family_of(network).time_embedder(network).parameters())
    held = {id(p): FP32 for p in exact}
    size = BF16 if recipe.precision is Precision.bf16 else FP32
    pieces = _shards(recipe, gpus) if recipe.shard_teacher else 1
    parts = {
        "frozen teacher": sum(
            held.get(id(p), size) * rows_of(p.shape, pieces).numel() for p in network.parameters()
        )
    }
    if pieces > 1:
        block, outside = _block_numel(network), _outside_numel(network)
        embedder = sum(p.numel() for p in exact)
        parts["teacher, whole for a moment"] = size * (outside - embedder + 3 * block) + FP32 * embedder
    return parts


def optimizer_state_numel(shapes: Iterable[torch.Size], kind: OptimizerKind) -> int:
    """Numbers an optimizer keeps. AdamW: two per weight. CAME: one, and two factored statistics."""
    if kind is OptimizerKind.adamw:
        return sum(2 * shape.numel() for shape in shapes)
    return sum(_came_state_numel(shape) for shape in shapes)


def _came_state_numel(shape: torch.Size) -> int:
    if len(shape) < 2:
        return 2 * shape.numel()  # vectors are not factored
    rows, columns = shape[0], shape[1:].numel()
    return rows * columns + 2 * (rows + columns)


def _state_numel(shapes: list[torch.Size], kind: OptimizerKind, layout: Layout) -> int:
    """Of the piece that a process steps. Of CAME's statistics the columns are whole everywhere."""
    if layout.engine is EngineKind.fsdp2:
        return optimizer_state_numel([rows_of(shape, layout.pieces) for shape in shapes], kind)
    if layout.pieces == 1:
        return optimizer_state_numel(shapes, kind)
    return 2 * layout.piece(shapes)  # ZeRO: AdamW only


def _whole_numel(module: nn.Module, layout: Layout) -> int:
    """Numbers of weights and gradients that are whole, or in a buffer, while the network is at work.

    fsdp2   what lies outside of the blocks, from forward to backward; of blocks, the weights of the one at work and
            of the next, which is on its way, a gradient and its copy that is being reduced. At the end of the
            backward the same of what lies outside, while the last block is still being reduced.
    zero2   one bucket of gradients
    zero3   the same, and weights that are kept for reuse
    """
    if layout.engine is EngineKind.fsdp2:
        block, outside = _block_numel(module), _outside_numel(module)
        return max(outside + 4 * block, 3 * outside + block)
    kept = min(LIVE, count(module)) if layout.engine is EngineKind.zero3 else 0
    return kept + (BUCKET if layout.engine in ZERO else 0)


def _blocks(module: nn.Module) -> nn.ModuleList:
    network = networks_in(module)[0]
    return family_of(network).blocks(network)


def _block_numel(module: nn.Module) -> int:
    return count(_blocks(module)[0])


def _outside_numel(module: nn.Module) -> int:
    return count(module) - count(_blocks(module))


def _shards(recipe: Recipe, gpus: int) -> int:
    """Processes that hold one copy between them."""
    return min(recipe.shard_size or gpus, gpus)
