"""A function's value, with its graph, and its directional derivative, without one."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def value_and_tangent(
    F: Callable[[Tensor, Tensor], Tensor], x_hat: Tensor, t: Tensor, v_x: Tensor, v_t: Tensor
) -> tuple[Tensor, Tensor]:
    """F(x_hat, t) with gradients to F's parameters, and dF = ∂F/∂x · v_x + ∂F/∂t · v_t detached.

    Two passes: forward-mode differentiation under no_grad, then a plain forward. The first runs softmax
    attention by its mathematical definition, since the fused kernels have no forward-mode derivative.
    F must be the same function both times: no dropout.  -> value, tangent, both shaped like F's output
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(F, (x_hat, t), (v_x, v_t))
    return F(x_hat, t), tangent
