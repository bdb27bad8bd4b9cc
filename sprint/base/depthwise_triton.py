"""`sprint.base.depthwise` on a GPU, in Triton: PyTorch's own depthwise kernels want channels first.

One program computes a tile of places × channels. Neighbouring channels lie side by side in memory, so every load is
whole lines; the k² reads of a place hit the cache. Sums are in float32, and no two programs add to one place, so a
result is the same bit for bit at every run. Import it only where Triton is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PLACES, CHANNELS = 32, 64  # of a tile
PARTS = 64  # into which the places are cut for a weight's gradient


@triton.jit
def _place(p, height, width):
    """Row and column of place number p of [B, H, W]."""
    return p // width % height, p % width


@triton.jit
def _forward(
    x,
    weight,
    bias,
    y,
    places,
    height,
    width,
    channels,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row, column = _place(p, height, width)
    inside = (p < places)[:, None] & (c < channels)[None, :]
    total = tl.zeros((PLACES, CHANNELS), tl.float32)
    for k in tl.static_range(K * K):
        down, right = k // K - K // 2, k % K - K // 2
        seen = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
        at = (p + down * width + right)[:, None] * channels + c[None, :]
        near = tl.load(x + at, mask=inside & seen[:, None], other=0.0).to(tl.float32)
        total += (
            near * tl.load(weight + k * channels + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
        )
    if HAS_BIAS:
        total += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    tl.store(y + p[:, None] * channels + c[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _of_weight(
    grad,
    x,
    out,
    places,
    height,
    width,
    channels,
    length,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out [parts, k², C] += Σ over a part's places of grad · x, k steps aside."""
    part, k = tl.program_id(0).to(tl.int64), tl.program_id(2)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    down, right = k // K - K // 2, k % K - K // 2
    total = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, length, PLACES):
        p = part * length + start + tl.arange(0, PLACES)
        row, column = _place(p, height, width)
        seen = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
        mine = (p < places) & (start + tl.arange(0, PLACES) < length)
        inside = (mine & seen)[:, None] & (c < channels)[None, :]
        g = tl.load(grad + p[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
        at = (p + down * width + right)[:, None] * channels + c[None, :]
        total += tl.sum(g * tl.load(x + at, mask=inside, other=0.0).to(tl.float32), axis=0)
    tl.store(out + (part * K * K + k) * channels + c, total, mask=c < channels)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `sprint.base.depthwise.depthwise`: x [B, H, W, C] contiguous, weight [C, 1, k, k], bias [C]."""
    batch, height, width, channels = x.shape
    y, places, side = torch.empty_like(x), batch * height * width, weight.shape[-1]
    by_place = weight.flatten(1).t().contiguous()  # [k², C]
    grid = (triton.cdiv(places, PLACES), triton.cdiv(channels, CHANNELS))
    has_bias = bias is not None
    _forward[grid](
        x,
        by_place,
        bias if has_bias else by_place,
        y,
        places,
        height,
        width,
        channels,
        K=side,
        HAS_BIAS=has_bias,
        PLACES=PLACES,
        CHANNELS=CHANNELS,
    )
    return y


def of_input(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x: the same convolution with every kernel turned round.  grad [B, H, W, C] contiguous"""
    return forward(grad, weight.flip(2, 3), None)


def of_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the weight, in its dtype and shape.  grad, x [B, H, W, C] contiguous"""
    batch, height, width, channels = x.shape
    places, side = batch * height * width, weight.shape[-1]
    length = triton.cdiv(places, PARTS)
    parts = triton.cdiv(places, length)
    out = torch.empty(parts, side * side, channels, dtype=torch.float32, device=x.device)
    _of_weight[(parts, triton.cdiv(channels, CHANNELS), side * side)](
        grad,
        x,
        out,
        places,
        height,
        width,
        channels,
        length,
        K=side,
        PLACES=PLACES,
        CHANNELS=CHANNELS,
    )
    return out.sum(0).t().reshape(weight.shape).to(weight.dtype)
