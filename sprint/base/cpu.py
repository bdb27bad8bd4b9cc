"""What makes training on a CPU faster and changes no mathematics. Nothing here touches a GPU run."""

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
LARGE = 32 * 2**20  # bytes: the highest threshold that glibc takes


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks for the next tensor instead of giving them back to the system at once.

    Otherwise every large tensor is paged in, page by page, each time it is made. Those of `LARGE` bytes and more go
    back: what computes them takes far longer than their pages, and holes of their size would be kept for good.
    -> whether it took
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        [mallopt(M_MMAP_THRESHOLD, LARGE), mallopt(M_TRIM_THRESHOLD, -1), mallopt(M_ARENA_MAX, 1)]
    )


@cache
def onednn_is_faster() -> bool:
    """True on AMD processors with AVX-512, where PyTorch's other library, MKL, multiplies without it."""
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_onednn and "AuthenticAMD" in described and "avx512f" in described


def use_onednn(module: nn.Module) -> nn.Module:
    """Send the float32 products of every linear layer on the CPU to oneDNN, if that is faster here.  -> module"""
    if onednn_is_faster():
        for part in module.modules():
            if type(part) is nn.Linear and part.weight.device.type == "cpu":
                part.forward = _Forward(part)
    return module


class _Forward:
    """A linear layer's forward; an object, so that the layer can still be copied and pickled."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.layer.weight, self.layer.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b. x [..., K]; weight [N, K]; bias [N].  -> [..., N]

    PyTorch's own for other dtypes and devices, under autocast, and under torch.compile, forward-mode
    differentiation and other function transforms, which oneDNN's operation does not know.
    """
    if torch.compiler.is_compiling():
        return nn.functional.linear(x, weight, bias)
    if has_torch_function((x,)):
        return handle_torch_function(linear, (x,), x, weight, bias)
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
