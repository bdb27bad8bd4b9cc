"""The certificate: what a conversion must show before it is kept.

(a) the inverse map gives back every source tensor, bit for bit;
(b) the flow velocity recovered from the TrigFlow view equals the network's own, over a grid of t in (0, π/2);
(c) the result, converted on to the flow and the original layout, still holds the source's tensors.
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


def compare_tensors(source: Checkpoint, written: Checkpoint, dtype: torch.dtype | None = None) -> int:
    """Every tensor of `source` against `written` mapped back to the source's layout; -> how many.

    Bits are compared, so NaN equals itself and −0 is not 0. With `dtype` the source is rounded first.
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
    return len(source.source.entries)


def _check_bits(original: Tensor, result: Tensor, name: str) -> None:
    same = original.dtype == result.dtype and original.shape == result.shape
    if not same or not torch.equal(as_bits(original), as_bits(result)):
        raise SprintError(f"certificate failed: {name} differs from the source; nothing was written")


def as_bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers of the same width, which compare as bits do."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


# ---- (b): velocities ----------------------------------------------------------------------------------


@torch.no_grad()
def velocity_error(network: ModelMixin, time_scale: float, dtype: torch.dtype) -> float:
    """Largest |v recovered from F − v| over a grid of t, relative to the largest |v| or |x_fm|.

    The network is called once through `TrigFlowView` and once directly, on the same random latents and text.
    Values that are not finite must not be finite in both.  Raises SprintError above TOLERANCE[dtype].
    """
    family = family_of(network)
    sizes = family.sizes(network.config)
    random = torch.Generator().manual_seed(0)
    side = GRID_CELLS * sizes.patch
    x_hat = torch.randn(GRID, sizes.channels, side, side, generator=random, dtype=torch.float64).to(dtype)
    text = torch.randn(GRID, TEXT_TOKENS, sizes.text_width, generator=random).to(dtype)
    mask = torch.ones(GRID, TEXT_TOKENS, dtype=torch.int64)
    guidance = torch.full((GRID,), GUIDANCE_SCALE, dtype=dtype) if family.is_student(network.config) else None
    t = torch.linspace(0, math.pi / 2, GRID + 2, dtype=dtype)[1:-1]

    t_fm = flow_time(t)
    x_fm = to_flow_input(x_hat, t_fm)
    v = family.velocity(network, x_fm, t_fm, text, mask, guidance, time_scale)
    F = TrigFlowView(network, time_scale)(x_hat, t, text, mask, guidance)
    return _relative_error(to_flow_velocity(F, x_fm, t_fm), v, x_fm, TOLERANCE[dtype])


def _relative_error(recovered: Tensor, v: Tensor, x_fm: Tensor, tolerance: float) -> float:
    finite = v.isfinite()
    if not torch.equal(finite, recovered.isfinite()):
        raise SprintError("certificate failed: the TrigFlow view is not finite where the network is")
    if not finite.any():
        return 0.0
    scale = max(v[finite].abs().max().item(), x_fm.abs().max().item())
    error = (recovered - v)[finite].abs().max().item() / scale
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


def check_velocity_fast(written: Checkpoint) -> dict:
    """(b) in fp32 on the first blocks between the network's two ends."""
    whole = written.sizes.depth
    depth = min(FAST_DEPTH, whole)
    network = build_network(written, torch.float32, depth)
    return {
        "network": f"first {depth} of {whole} blocks",
        "times": GRID,
        "fp32_error": velocity_error(network, written.time_scale, torch.float32),
        "fp64_error": None,
    }


def check_velocity_full(written: Checkpoint, folder: Path) -> dict:
    """(b) in fp32 and fp64 on the whole network, opened as diffusers opens it."""
    network = written.family.network_class.from_pretrained(folder, torch_dtype=torch.float32).eval()
    fp32 = velocity_error(network, written.time_scale, torch.float32)
    fp64 = velocity_error(network.double(), written.time_scale, torch.float64)
    return {"network": "whole", "times": GRID, "fp32_error": fp32, "fp64_error": fp64}
