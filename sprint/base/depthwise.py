"""A depthwise convolution over pictures whose channels lie last: one operator with backward, compiled graphs and duals.

On a CPU it is PyTorch's own on channels-last pictures; but there nothing keeps a gradient that arrives otherwise in
memory, or a compiled graph, from sending its backward down a path that is ten times slower. On a GPU it is
`sprint.base.depthwise_triton`, where Triton is.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each channel with its own k×k kernel, k odd, zeros around; as `conv2d(padding=k//2, groups=C)`.

    x [B, H, W, C]; weight [C, 1, k, k]; bias [C].  -> [B, H, W, C], contiguous; in autocast's dtype where it is on
    """
    if has_torch_function((x,)):
        return handle_torch_function(depthwise, (x,), x, weight, bias)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _depthwise(x, weight, bias)


@torch.library.custom_op("sprint::depthwise", mutates_args=())
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _by_convolution(x, weight, bias)


def _by_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _back(torch.conv2d(_as_picture(x), weight, bias, padding=_margin(weight), groups=len(weight)))


@_depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("sprint::depthwise_backward", mutates_args=())
def _depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, for_x: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; empty ones where nobody asks."""
    return _backward_by_convolution(grad, x, weight, for_x, for_weight)


def _backward_by_convolution(
    grad: Tensor, x: Tensor, weight: Tensor, for_x: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    channels, once = len(weight), [1, 1]
    wanted = [for_x, for_weight, for_weight]
    of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
        _as_picture(grad),
        _as_picture(x),
        weight,
        [channels],
        once,
        _margin(weight),
        once,
        False,
        [0, 0],
        channels,
        wanted,
    )
    nothing = grad.new_empty(0)
    of_x = _back(of_x) if for_x else nothing
    return (of_x, of_weight.contiguous(), of_bias) if for_weight else (of_x, nothing, nothing.clone())


@_depthwise_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, for_x: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    of_x, of_weight = x.shape if for_x else (0,), weight.shape if for_weight else (0,)
    return x.new_empty(of_x), x.new_empty(of_weight), x.new_empty(of_weight[:1])


def _as_picture(x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W], channels last in memory"""
    return x.contiguous().permute(0, 3, 1, 2)


def _back(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _margin(weight: Tensor) -> list[int]:
    return [side // 2 for side in weight.shape[2:]]


# ---- on a GPU -----------------------------------------------------------------------------------------------


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@_depthwise.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _has_triton():
        return _by_convolution(x, weight, bias)
    from sprint.base import depthwise_triton

    return depthwise_triton.forward(x.contiguous(), weight, bias)


@_depthwise_backward.register_kernel("cuda")
def _(
    grad: Tensor, x: Tensor, weight: Tensor, for_x: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not _has_triton():
        return _backward_by_convolution(grad, x, weight, for_x, for_weight)
    from sprint.base import depthwise_triton

    grad, x, nothing = grad.contiguous(), x.contiguous(), grad.new_empty(0)
    of_x = depthwise_triton.of_input(grad, weight) if for_x else nothing
    if not for_weight:
        return of_x, nothing, nothing.clone()
    return of_x, depthwise_triton.of_weight(grad, x, weight), grad.sum((0, 1, 2))


# ---- autograd -----------------------------------------------------------------------------------------------


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad
    for_weight = for_weight or for_bias
    of_x, of_weight, of_bias = _depthwise_backward(grad, x, weight, for_x, for_weight)
    return (
        of_x if for_x else None,
        of_weight if for_weight else None,
        of_bias if for_weight and ctx.has_bias else None,
    )


_depthwise.register_autograd(_backward, setup_context=_remember)
