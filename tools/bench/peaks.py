"""The machine's own speeds, which floors are made of: its fastest matrix products by dtype, and a large copy.

Imported by tools/bench/flops.py; not a program.
"""

import torch
from torch import Tensor
from torch.nn import functional as nnf

from sprint.base.products import float32_products
from tools.bench.measure import SIZES, Request, interleaved

COPY_BYTES = 256 * 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def product_speeds(request: Request, dtype_name: str, rounds: int) -> dict[str, float]:
    """FLOPs per second: of a square product, and of the projections and convolutions that the step is made of."""
    size, device, dtype = SIZES[request.network], request.device, DTYPES[dtype_name]
    width = size.config["num_attention_heads"] * size.config["attention_head_dim"]
    side, batch, inner = size.config["sample_size"], request.batch, int(2.5 * width)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    n, rows = 1024 if device == "cpu" else 8192, batch * side**2
    multiply = float32_products()  # torch's own where the factors are bf16
    square, x, weight = new(n, n), new(batch, side**2, width), new(width, width)
    picture, wide = new(batch, width, side, side), new(2 * inner, width, 1, 1)
    last = picture.to(memory_format=torch.channels_last)
    ring, nine = last.flatten(2).unsqueeze(2), new(width, width, 1, 9)  # as a head sees its tokens
    products = {
        f"{n}×{n} by {n}×{n}": (lambda: multiply(square, square), 2 * n**3),
        f"projection {rows}×{width} by {width}×{width}": (lambda: multiply(x, weight), 2 * rows * width**2),
        f"1×1 convolution {width} to {2 * inner}": (
            lambda: nnf.conv2d(picture, wide),
            4 * rows * width * inner,
        ),
        "the same, channels last": (lambda: nnf.conv2d(last, wide), 4 * rows * width * inner),
        "9 tokens wide convolution, channels last": (
            lambda: nnf.conv2d(ring, nine),
            18 * (rows - 8 * batch) * width**2,
        ),
    }
    with torch.no_grad():
        seconds = interleaved({name: run for name, (run, _) in products.items()}, rounds, warmup=2)
    return {name: flops / min(seconds[name]) for name, (_, flops) in products.items()}


def copy_speed(device: str, rounds: int) -> float:
    """Bytes read and written per second by a copy too large for any cache."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / min(interleaved({"copy": lambda: target.copy_(source)}, rounds)["copy"])
