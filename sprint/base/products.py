"""Which library multiplies, and in what precision: float32 as PyTorch does it, by oneDNN, or of bf16 factors.

A layer whose `forward` is a `Product` multiplies as it is told by `use_products`. On a GPU nothing changes.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.overrides import handle_torch_function, has_torch_function

Multiply = Callable[
    [Tensor, Tensor, Tensor | None], Tensor
]  # x [..., K], weight [N, K], bias [N] -> [..., N]

GAIN = 1.1  # how much faster bf16 must be to be taken: with instructions for it twice to four times, without half
TRIED = (1024, 512, 512)  # rows, K, N of the product that is timed
ROUNDS = 10


class Product:
    """The forward of a linear layer, or of a 1×1 convolution whose input has its channels last.

    An object, so that the layer can still be copied and pickled.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, multiply: Multiply = linear):
        self.layer, self.multiply = layer, multiply

    def __call__(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.layer.weight.flatten(1), self.layer.bias)


def use_products(module: nn.Module, multiply: Multiply | None = None) -> nn.Module:
    """Have every linear layer inside that lies on the CPU multiply so; without a way, by the best in float32.

    -> module
    """
    multiply = multiply or float32_products()
    for part in module.modules():
        product = part.__dict__.get("forward")
        if isinstance(product, Product) and part.weight.device.type == "cpu":
            product.multiply = multiply
        elif type(part) is nn.Linear and part.weight.device.type == "cpu" and multiply is not linear:
            part.forward = Product(part, multiply)
    return module


def float32_products() -> Multiply:
    return onednn_linear if onednn_is_faster() else linear


@cache
def fastest_products() -> Multiply:
    """`bf16_linear` where this processor multiplies bf16 faster, by the clock; else the best in float32."""
    exact = float32_products()
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return exact
    rounded, whole = _seconds((bf16_linear, exact))
    return bf16_linear if rounded * GAIN < whole else exact


@torch.no_grad()
def _seconds(ways: Sequence[Multiply]) -> list[float]:
    """Of one product each, the least of some taken in turns: of this thread's work, whatever else the machine does."""
    rows, inner, outer = TRIED
    x, weight, bias = torch.ones(rows, inner), torch.ones(outer, inner), torch.ones(outer)
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS):
        for multiply, taken in zip(ways, seconds, strict=True):
            began = time.thread_time()
            multiply(x, weight, bias)
            taken.append(time.thread_time() - began)
    return [min(taken) for taken in seconds]


# ---- bf16 ---------------------------------------------------------------------------------------------------


def bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b with both factors rounded to bf16, summed in float32 and rounded once more; gradients likewise.

    In and out are in the dtype of x.
    """
    if has_torch_function((x,)):
        return handle_torch_function(bf16_linear, (x,), x, weight, bias)
    y = linear(x.to(torch.bfloat16), weight.to(torch.bfloat16)).to(x.dtype)
    return y if bias is None else y + bias


# ---- oneDNN -------------------------------------------------------------------------------------------------


@cache
def onednn_is_faster() -> bool:
    """True on AMD processors with AVX-512, where PyTorch's other library, MKL, multiplies without it."""
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_onednn and "AuthenticAMD" in described and "avx512f" in described


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b by oneDNN, in float32. x [..., K]; weight [N, K]; bias [N].  -> [..., N]

    PyTorch's own for other dtypes and devices, under autocast, and under torch.compile, forward-mode
    differentiation and other function transforms, which oneDNN's operation does not know.
    """
    if torch.compiler.is_compiling():
        return nn.functional.linear(x, weight, bias)
    if has_torch_function((x,)):
        return handle_torch_function(onednn_linear, (x,), x, weight, bias)
    float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    wrapped = any(map(torch._C._functorch.is_functorch_wrapped_tensor, (x, weight)))
    if not float32 or x.device.type != "cpu" or wrapped or forward_ad._current_level >= 0:
        return nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() or type(x) is not Tensor:  # a fake tensor is being traced
        return _onednn_linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # 20 µs less


@torch.library.custom_op("sprint::onednn_linear", mutates_args=(), device_types="cpu")
def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, _ = inputs
    for_x, for_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if for_weight else None, weight if for_x else None)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        _onednn_linear(grad, weight.t(), None) if for_x else None,
        _onednn_linear(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if for_weight else None,
        rows.sum(0) if for_bias else None,
    )


_onednn_linear.register_autograd(_backward, setup_context=_remember)
