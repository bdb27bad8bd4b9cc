"""The two optimizers, the warm-up and the clip. A stage asks for them with its own recipe settings."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sprint.errors import SprintError
from sprint.recipe import Optimizer as OptimizerSettings
from sprint.recipe import OptimizerKind


class CAME(torch.optim.Optimizer):
    """Confidence-guided adaptive memory-efficient optimization (arXiv 2307.02047, Algorithm 2).

    lr              η, step size; there is no bias correction, so the first updates are large: warm up
    betas           β1 of the update, β2 of the squared gradient, β3 of the instability
    eps             ε1 added to the squared gradient, ε2 to the instability
    clip_threshold  d, the largest root mean square of a normalised gradient
    weight_decay    decoupled: weights shrink by 1 − lr · weight_decay

    A weight [out, ...] counts as the matrix [out, prod(...)], so that 1×1 convolutions, half of Sana's
    parameters, are factored like linear layers: one row and one column of statistics, and the full momentum.
    The public `came-pytorch` factors the trailing axes, and there spends five full-size buffers on them.
    Tensors of one axis keep the whole second moment and no instability, as in the authors' code.
    State lives in the weights' dtype: keep them in float32 or wider.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update_ = _update_vector_ if parameter.ndim < 2 else _update_matrix_
                    update_(parameter, self.state[parameter], group)
        return loss


def _update_matrix_(parameter: Tensor, state: dict, group: dict) -> None:
    beta1, beta2, beta3 = group["betas"]
    eps1, eps2 = group["eps"]
    g = parameter.grad.flatten(1)
    if not state:
        state["momentum"] = torch.zeros_like(g)
        for name in ("square", "instability"):
            state[f"{name}_row"], state[f"{name}_column"] = g.new_zeros(g.shape[0]), g.new_zeros(g.shape[1])
    m = state["momentum"]

    _average_rows_and_columns_(state, "square", g.square() + eps1, beta2)  # r_t, c_t
    u = _clip_rms_(g * _factored_rsqrt(state, "square"), group["clip_threshold"])  # û_t
    m.lerp_(u, 1 - beta1)
    _average_rows_and_columns_(state, "instability", (u - m).square_() + eps2, beta3)  # R_t, C_t
    _descend_(parameter, m * _factored_rsqrt(state, "instability"), group)


def _update_vector_(parameter: Tensor, state: dict, group: dict) -> None:
    beta1, beta2, _ = group["betas"]
    g = parameter.grad
    if not state:
        state["momentum"], state["square"] = torch.zeros_like(g), torch.zeros_like(g)
    state["square"].lerp_(g.square() + group["eps"][0], 1 - beta2)
    u = _clip_rms_(g * state["square"].rsqrt(), group["clip_threshold"])
    state["momentum"].lerp_(u, 1 - beta1)
    _descend_(parameter, state["momentum"], group)


def _average_rows_and_columns_(state: dict, name: str, value: Tensor, beta: float) -> None:
    state[f"{name}_row"].lerp_(value.mean(dim=1), 1 - beta)
    state[f"{name}_column"].lerp_(value.mean(dim=0), 1 - beta)


def _factored_rsqrt(state: dict, name: str) -> Tensor:
    """1/√(r · cᵀ / mean(r)), the roots taken before the product, which underflows float32."""
    row, column = state[f"{name}_row"], state[f"{name}_column"]
    return torch.outer((row / row.mean()).rsqrt(), column.rsqrt())


def _clip_rms_(u: Tensor, threshold: float) -> Tensor:
    """û = u / max(1, RMS(u)/d)."""
    return u.div_((u.square().mean().sqrt() / threshold).clamp_(min=1.0))


def _descend_(parameter: Tensor, update: Tensor, group: dict) -> None:
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.sub_(update.view(parameter.shape), alpha=group["lr"])


# ---- what a stage asks for --------------------------------------------------------------------------


def build_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW or CAME over `parameters`, with the settings of one network: generator and discriminator differ.

    Raises SprintError for a wrong number of betas, TypeError for half-precision weights, which small
    updates would not move.
    """
    parameters = list(parameters)
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters):
        raise TypeError("optimized weights must be float32 or float64; use autocast for bf16 compute")
    expected = 3 if settings.kind is OptimizerKind.came else 2
    if len(settings.betas) != expected:
        raise SprintError(
            f"optimizer.betas: {settings.kind.value} takes {expected} values, got {list(settings.betas)}"
        )
    optimizer = CAME if settings.kind is OptimizerKind.came else torch.optim.AdamW
    return optimizer(
        parameters, lr=settings.lr, betas=tuple(settings.betas), weight_decay=settings.weight_decay
    )


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, settings: OptimizerSettings, updates: int
) -> LambdaLR:
    """Linear warm-up, constant, linear decay over the last `decay_share` of `updates`.

    Update n (from 1) runs at lr · min(1, n / warmup_steps, (updates − n + 1) / (decay_share · updates)).
    Step it after each optimizer step.
    """

    def factor(done: int) -> float:
        rise = (done + 1) / max(1, settings.warmup_steps)
        fall = (updates - done) / max(1.0, settings.decay_share * updates) if settings.decay_share else 1.0
        return max(0.0, min(1.0, rise, fall))

    return LambdaLR(optimizer, factor)


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float) -> Tensor:
    """Scale gradients to a global L2 norm of at most `clip_norm`.  -> the norm before, a scalar.

    A norm that is not finite is returned as it is, and the gradients are then unusable: check it before
    the optimizer steps.
    """
    return nn.utils.clip_grad_norm_(parameters, clip_norm)
