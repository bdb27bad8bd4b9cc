"""The GPU's kernels by Triton's interpreter, on this processor: distances from torch's convolution, as JSON.

TRITON_INTERPRET=1 python tests/base/depthwise_processes.py
"""

import json

import torch
from torch.nn.functional import conv2d

from sprint.base import depthwise_triton

# B, H, W, C, k: fewer places and channels than a tile, more, and not a multiple of it
SIZES = ((2, 5, 4, 6, 3), (1, 7, 9, 70, 5), (3, 8, 8, 65, 1))


def distances(batch: int, height: int, width: int, channels: int, side: int) -> list[float]:
    """Of value, value without bias, gradient of the input and of the weight: largest error over largest element."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    x, weight, bias = (
        random(batch, height, width, channels),
        random(channels, 1, side, side),
        random(channels),
    )
    grad = random(*x.shape)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = conv2d(leaves[0].permute(0, 3, 1, 2), leaves[1], bias, padding=side // 2, groups=channels)
    y = y.permute(0, 2, 3, 1)
    of_x, of_weight = torch.autograd.grad(y, leaves, grad)
    pairs = (
        (depthwise_triton.forward(x, weight, bias), y),
        (depthwise_triton.forward(x, weight, None), y - bias),
        (depthwise_triton.of_input(grad, weight), of_x),
        (depthwise_triton.of_weight(grad, x, weight), of_weight),
    )
    return [((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs]


if __name__ == "__main__":
    print(json.dumps([distances(*size) for size in SIZES]))
