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

    Attribute `found_inf`, a scalar of 0.0 or 1.0 on the weights' device, as torch's fused optimizers have it:
    at 1.0 `step` leaves weights and state as they are, without the host ever reading it.
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
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            found_inf = torch.zeros((), device=self.param_groups[0]["params"][0].device)
        skip = found_inf.bool()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update_ = _update_vector_ if parameter.ndim < 2 else _update_matrix_
                    update_(parameter, self.state[parameter], group, skip)
        return loss


def _update_matrix_(parameter: Tensor, state: dict, group: dict, skip: Tensor) -> None:
    """The time goes into whole matrices, so each is touched as seldom as the equations allow."""
    beta1, beta2, beta3 = group["betas"]
    eps1, eps2 = group["eps"]
    g = parameter.grad.flatten(1)
    if not state:
        state["momentum"] = torch.zeros_like(g)
        for name in ("square", "instability"):
            state[f"{name}_row"], state[f"{name}_column"] = g.new_zeros(g.shape[0]), g.new_zeros(g.shape[1])
    m = state["momentum"]

    g_square = g.square()
    _average_(state["square_row"], g_square.mean(dim=1) + eps1, beta2, skip)  # r_t
    _average_(state["square_column"], g_square.mean(dim=0) + eps1, beta2, skip)  # c_t
    row, column = _factored_rsqrt(state["square_row"], state["square_column"])
    rms = (row.square() @ (g_square @ column.square()) / g.numel()).sqrt()
    row = row / (rms / group["clip_threshold"]).clamp(min=1.0)  # û_t = g · row · columnᵀ, RMS at most d

    scaled = torch.mul(g, row[:, None], out=g_square)
    change = torch.addcmul(m, scaled, column, value=-1).masked_fill_(skip, 0.0)  # m_{t−1} − û_t
    m.sub_(change, alpha=1 - beta1)  # m_t
    U = change.mul_(beta1).square_()  # (û_t − m_t)² = β1² (m_{t−1} − û_t)²
    _average_(state["instability_row"], U.mean(dim=1) + eps2, beta3, skip)  # R_t
    _average_(state["instability_column"], U.mean(dim=0) + eps2, beta3, skip)  # C_t
    row, column = _factored_rsqrt(state["instability_row"], state["instability_column"])

    row, column = row.masked_fill_(skip, 0.0), column.masked_fill_(skip, 0.0)
    update = torch.mul(m, row[:, None], out=U)
    _decay_(parameter, group, skip)
    parameter.addcmul_(
        update.view(parameter.shape), column.view(parameter.shape[1:]), value=-group["lr"]
    )  # θ_t


def _update_vector_(parameter: Tensor, state: dict, group: dict, skip: Tensor) -> None:
    beta1, beta2, _ = group["betas"]
    g = parameter.grad
    if not state:
        state["momentum"], state["square"] = torch.zeros_like(g), torch.zeros_like(g)
    m = state["momentum"]
    _average_(state["square"], g.square() + group["eps"][0], beta2, skip)
    u = g * state["square"].rsqrt()
    u = u / (u.square().mean().sqrt() / group["clip_threshold"]).clamp(min=1.0)  # û = u / max(1, RMS(u)/d)
    _average_(m, u, beta1, skip)
    _decay_(parameter, group, skip)
    parameter.sub_(m.masked_fill(skip, 0.0), alpha=group["lr"])


def _average_(average: Tensor, value: Tensor, beta: float, skip: Tensor) -> None:
    """β · average + (1 − β) · value, or the average itself, to the bit, where the update is skipped."""
    average.lerp_(torch.where(skip, average, value), 1 - beta)


def _factored_rsqrt(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """a, b with a · bᵀ = 1/√(r · cᵀ / mean(r)): no root of the product, which underflows float32."""
    return (row / row.mean()).rsqrt(), column.rsqrt()


def _decay_(parameter: Tensor, group: dict, skip: Tensor) -> None:
    if rate := group["lr"] * group["weight_decay"]:
        parameter.mul_(1 - rate * skip.logical_not().to(parameter.dtype))


# ---- what a stage asks for --------------------------------------------------------------------------


def build_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW or CAME over `parameters`, with the settings of one network: generator and discriminator differ.

    Both skip an update on the device where their attribute `found_inf` is 1.0 (`CAME` says more).
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
    betas, decay = tuple(settings.betas), settings.weight_decay
    if settings.kind is OptimizerKind.came:
        return CAME(parameters, lr=settings.lr, betas=betas, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=settings.lr, betas=betas, weight_decay=decay, fused=True)


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, settings: OptimizerSettings, updates: int
) -> LambdaLR:
    """Linear warm-up, constant, linear decay over the last `decay_share` of `updates`.

    Update n (from 1) runs at lr · min(1, n / warmup_steps, (updates − n + 1) / (decay_share · updates)).
    Step it after each update, skipped ones too: it counts on the host.
    """

    def factor(done: int) -> float:
        rise = (done + 1) / max(1, settings.warmup_steps)
        fall = (updates - done) / max(1.0, settings.decay_share * updates) if settings.decay_share else 1.0
        return max(0.0, min(1.0, rise, fall))

    return LambdaLR(optimizer, factor)


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float) -> Tensor:
    """Scale gradients to a global L2 norm of at most `clip_norm`.  -> the norm before, a scalar.

    A norm that is not finite is returned as it is, and the gradients are then unusable: skip the update.
    """
    return nn.utils.clip_grad_norm_(parameters, clip_norm)
