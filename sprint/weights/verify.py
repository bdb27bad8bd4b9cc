"""The certificate: what a conversion must show before it is kept.

The output is opened anew, as a stranger opens it: from nothing but itself.

(a) the inverse map gives back every source tensor, bit for bit, and every setting of the network is the source's;
(b) the flow velocity recovered from the output's TrigFlow view equals the source's network's own, over a grid of t in
    (0, π/2): two networks, each built from its own files;
(c) the result, converted on to the flow and the original layout, still holds the source's tensors and settings.

Nothing compared, or values that are not finite, is a failure.
"""

import math
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor

from sprint.base.errors import SprintError
from sprint.maths.trigflow import flow_time, to_flow_input, to_flow_velocity
from sprint.models.families import family_of
from sprint.models.view import TrigFlowView
from sprint.weights.checkpoint import Checkpoint, round_to
from sprint.weights.load import build_network
from sprint.weights.sources import Reader

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
GRID = 15  # times in (0, π/2), the ends left out
FAST_DEPTH = 2
GUIDANCE_SCALE = 4.5  # for networks that embed one
TEXT_TOKENS = 8
GRID_CELLS = 4  # patches a side of the pictures that check (b)


# ---- (a) and (c): bits --------------------------------------------------------------------------------


def compare_settings(source: Checkpoint, written: Checkpoint, name: str) -> int:
    """Every setting of `source`'s network, and its clock, against what the output alone tells; -> how many.

    Raises SprintError that names those that would be lost.
    """
    wanted = source.config | {"time_scale": source.time_scale}
    told = written.config | {"time_scale": written.time_scale}
    lost = [
        f"{key} {value} (it would be {told.get(key)})"
        for key, value in wanted.items()
        if told.get(key) != value
    ]
    if lost:
        raise SprintError(f"{name} has no place for {', '.join(lost)}; {remedy(name)}")
    return len(wanted)


def remedy(name: str) -> str:
    """What to do where an output does not tell all that the source told."""
    if name.lower().endswith(".safetensors"):
        return "nothing was written"
    return "name the output .safetensors, whose metadata has; nothing was written"


def compare_tensors(source: Checkpoint, written: Checkpoint, dtype: torch.dtype | None = None) -> int:
    """Every tensor of `source` against `written` mapped back to the source's layout; -> how many.

    Bits are compared, so −0 is not 0. With `dtype` the source is rounded first.
    Raises SprintError naming the first tensor that differs.
    """
    originals, results = Reader(source.source), Reader(written.source)
    for rule in source.rules:
        back = rule.map(tuple(results[n] for n in rule.names(written.layout)), written.layout, source.layout)
        for name, result in zip(rule.names(source.layout), back, strict=True):
            original = originals[name] if dtype is None else round_to(dtype, originals[name], name)
            _check_bits(original, result, name)
    for name in source.extras:
        if name not in written.source.entries:
            raise SprintError(f"certificate failed: {name} was not kept; nothing was written")
        _check_bits(originals[name], results[name], name)
    count = len(source.source.entries) - len(source.recomputed)
    if not count:
        raise SprintError("certificate failed: there was no tensor to compare; nothing was written")
    return count


def _check_bits(original: Tensor, result: Tensor, name: str) -> None:
    same = original.dtype == result.dtype and original.shape == result.shape
    if not same or not torch.equal(as_bits(original), as_bits(result)):
        raise SprintError(f"certificate failed: {name} differs from the source; nothing was written")


def as_bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers of the same width, which compare as bits do."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


# ---- (b): velocities ----------------------------------------------------------------------------------


@torch.no_grad()
def own_velocity(network: ModelMixin, time_scale: float, dtype: torch.dtype) -> Tensor:
    """v of a network called directly, on random latents and text that its sizes and `dtype` alone decide."""
    x_hat, t, text, mask, guidance = _probe(network, dtype)
    t_fm = flow_time(t)
    x_fm = to_flow_input(x_hat, t_fm)
    return family_of(network).velocity(network, x_fm, t_fm, text, mask, guidance, time_scale)


@torch.no_grad()
def velocity_error(v: Tensor, network: ModelMixin, time_scale: float, dtype: torch.dtype) -> float:
    """Largest |v recovered from F − v| over a grid of t, relative to the largest |v| or |x_fm|.

    v         `own_velocity` of the source's network
    network   the output's, called through `TrigFlowView`
    Raises SprintError above TOLERANCE[dtype], and for values that are not finite.
    """
    x_hat, t, text, mask, guidance = _probe(network, dtype)
    t_fm = flow_time(t)
    x_fm = to_flow_input(x_hat, t_fm)
    F = TrigFlowView(network, time_scale)(x_hat, t, text, mask, guidance)
    return _relative_error(to_flow_velocity(F, x_fm, t_fm), v, x_fm, TOLERANCE[dtype])


def _probe(network: ModelMixin, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x_hat [GRID, C, h, w], t [GRID], text [GRID, T, D], mask [GRID, T], guidance [GRID] or None"""
    family = family_of(network)
    sizes = family.sizes(network.config)
    random = torch.Generator().manual_seed(0)
    side = GRID_CELLS * sizes.patch
    x_hat = torch.randn(GRID, sizes.channels, side, side, generator=random, dtype=torch.float64).to(dtype)
    text = torch.randn(GRID, TEXT_TOKENS, sizes.text_width, generator=random).to(dtype)
    mask = torch.ones(GRID, TEXT_TOKENS, dtype=torch.int64)
    guidance = torch.full((GRID,), GUIDANCE_SCALE, dtype=dtype) if family.is_student(network.config) else None
    return x_hat, torch.linspace(0, math.pi / 2, GRID + 2, dtype=dtype)[1:-1], text, mask, guidance


def _relative_error(recovered: Tensor, v: Tensor, x_fm: Tensor, tolerance: float) -> float:
    for whose, values in (("source", v), ("output", recovered)):
        if not (finite := values.isfinite()).all() or not values.numel():
            raise SprintError(
                f"certificate failed: of {values.numel():,} velocities of the {whose}'s network {int(finite.sum()):,} "
                "are finite, so there is nothing to compare; nothing was written"
            )
    scale = max(v.abs().max().item(), x_fm.abs().max().item())
    error = (recovered - v).abs().max().item() / scale
    if not error <= tolerance:
        raise SprintError(
            f"certificate failed: velocities differ by {error:.1e} > {tolerance:.0e}; nothing was written"
        )
    return error


# ---- the certificate ----------------------------------------------------------------------------------


def check_bits(source: Checkpoint, written: Checkpoint, dtype: torch.dtype | None) -> dict:
    """(a), from the written files."""
    return {
        "tensors": compare_tensors(source, written, dtype),
        "equal": "bit for bit"
        if dtype is None
        else f"bit for bit, after rounding the source to {str(dtype).removeprefix('torch.')}",
    }


def check_velocity_fast(source: Checkpoint, written: Checkpoint, rounded: torch.dtype | None) -> dict:
    """(b) in fp32 on the first blocks between the networks' two ends."""
    whole, dtype = source.sizes.depth, torch.float32
    depth = min(FAST_DEPTH, whole)
    v = own_velocity(build_network(source, dtype, depth, rounded), source.time_scale, dtype)
    return {
        "network": f"first {depth} of {whole} blocks",
        "times": GRID,
        "fp32_error": velocity_error(v, build_network(written, dtype, depth), written.time_scale, dtype),
        "fp64_error": None,
    }


def check_velocity_full(
    source: Checkpoint, written: Checkpoint, rounded: torch.dtype | None, folder: Path | None
) -> dict:
    """(b) in fp32 and fp64 on whole networks, one of them in memory at a time.

    folder   of a network that diffusers opens: it does
    """
    network = build_network(source, torch.float32, rounded=rounded)
    v = {torch.float32: own_velocity(network, source.time_scale, torch.float32)}
    v[torch.float64] = own_velocity(network.double(), source.time_scale, torch.float64)
    del network
    if folder is None:
        network = build_network(written, torch.float32)
    else:
        network = written.family.network_class.from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        ).eval()
    fp32 = velocity_error(v[torch.float32], network, written.time_scale, torch.float32)
    fp64 = velocity_error(v[torch.float64], network.double(), written.time_scale, torch.float64)
    return {"network": "whole", "times": GRID, "fp32_error": fp32, "fp64_error": fp64}
