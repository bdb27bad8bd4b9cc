"""CAME, on whole weights or on shards of their rows: one function per kind of weight, one line per equation."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

Update = Iterator[tuple[Tensor, ...]]  # one weight's update, paused wherever it needs sums over all rows


class Rows(NamedTuple):
    """How the rows (axis 0) of one weight lie over processes; each has some, or none."""

    count: int  # of the whole weight
    group: dist.ProcessGroup  # the processes that hold its rows, each row once


class CAME(torch.optim.Optimizer):
    """Confidence-guided adaptive memory-efficient optimization (arXiv 2307.02047, Algorithm 2).

    lr              η, step size; there is no bias correction, so the first updates are large: warm up
    betas           β1 of the update, β2 of the squared gradient, β3 of the instability
    eps             ε1 added to the squared gradient, ε2 to the instability
    clip_threshold  d, the largest root mean square of a normalised gradient
    weight_decay    decoupled: weights shrink by 1 − lr · weight_decay
    rows            for each weight of which this process has a shard of the rows, how they lie; others are whole

    A weight [out, ...] counts as the matrix [out, prod(...)], so that 1×1 convolutions, half of Sana's
    parameters, are factored like linear layers: one row and one column of statistics, and the full momentum.
    The public `came-pytorch` factors the trailing axes, and there spends five full-size buffers on them.
    Tensors of one axis keep the whole second moment and no instability, as in the authors' code.
    State lives in the weights' dtype: keep them in float32 or wider.

    Shards take the steps that whole weights would, with three all-reduces an update for all weights of a group
    and dtype together. The processes of a group must agree on order, on which weights have gradients, on `found_inf`.

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
        rows: Mapping[nn.Parameter, Rows] | None = None,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.rows = dict(rows or {})

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
        shared: dict[tuple[dist.ProcessGroup, torch.dtype], list[Update]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, rows = self.state[parameter], self.rows.get(parameter)
                if not state:
                    state.update(initial_state(parameter))
                update_ = _update_vector_ if parameter.ndim < 2 else _update_matrix_
                update = update_(parameter, state, group, skip, rows)
                if rows is None:
                    _alone(update)
                else:
                    shared[rows.group, parameter.dtype].append(update)
        for (processes, _), updates in shared.items():
            _together(updates, processes)
        return loss


def initial_state(parameter: Tensor) -> dict[str, Tensor]:
    """What CAME keeps of a weight [out, ...], or of its shard, before the first update: zeros."""
    if parameter.ndim < 2:
        return {name: torch.zeros_like(parameter) for name in ("momentum", "square")}
    rows, columns = parameter.shape[0], parameter.shape[1:].numel()
    shapes = {
        "momentum": (rows, columns),
        "square_row": (rows,),
        "square_column": (columns,),
        "instability_row": (rows,),
        "instability_column": (columns,),
    }
    return {name: parameter.new_zeros(shape) for name, shape in shapes.items()}


# ---- sums over all rows -----------------------------------------------------------------------------


def _alone(update: Update) -> None:
    """A whole weight: the sums of its own rows are all there is."""
    for _ in update:
        pass


def _together(updates: list[Update], group: dist.ProcessGroup) -> None:
    """Shards, from sum to sum side by side: what they wait for at one time is one all-reduce."""
    while waited_for := [total for update in updates for total in next(update, ())]:
        flat = torch.cat([total.reshape(-1) for total in waited_for])
        dist.all_reduce(flat, group=group)
        pieces = flat.split([total.numel() for total in waited_for])
        torch._foreach_copy_(
            waited_for, [piece.view_as(total) for piece, total in zip(pieces, waited_for, strict=True)]
        )


# ---- the equations ----------------------------------------------------------------------------------


def _update_matrix_(parameter: Tensor, state: dict, group: dict, skip: Tensor, rows: Rows | None) -> Update:
    """The time goes into whole matrices, so each is touched as seldom as the equations allow.

    After a `yield` its tensors hold the sums over all rows, here or not. There all shards wait for one another,
    so a shard drops what is as large as itself; a whole weight goes on with it.
    """
    beta1, beta2, beta3 = group["betas"]
    eps1, eps2 = group["eps"]
    g = parameter.grad.flatten(1)
    m = state["momentum"]
    shard = rows is not None
    count = rows.count if shard else g.shape[0]

    g_square = g.square()
    _average_(state["square_row"], g_square.mean(dim=1) + eps1, beta2, skip)  # r_t
    column_sum, row_sum = g_square.sum(dim=0), state["square_row"].sum()
    if shard:
        g_square = None
    yield column_sum, row_sum
    _average_(state["square_column"], column_sum / count + eps1, beta2, skip)  # c_t
    row, column = _factored_rsqrt(state["square_row"], row_sum / count, state["square_column"])

    if shard:
        g_square = g.square()
    u_square_sum = row.square() @ (g_square @ column.square())
    if shard:
        g_square = None
    yield (u_square_sum,)
    rms = (u_square_sum / (count * g.shape[1])).sqrt()
    row = row / (rms / group["clip_threshold"]).clamp(min=1.0)  # û_t = g · row · columnᵀ, RMS at most d

    scaled = torch.mul(g, row[:, None], out=g_square)
    change = torch.addcmul(m, scaled, column, value=-1).masked_fill_(skip, 0.0)  # m_{t−1} − û_t
    m.sub_(change, alpha=1 - beta1)  # m_t
    U = change.mul_(beta1).square_()  # (û_t − m_t)² = β1² (m_{t−1} − û_t)²
    _average_(state["instability_row"], U.mean(dim=1) + eps2, beta3, skip)  # R_t
    column_sum, row_sum = U.sum(dim=0), state["instability_row"].sum()
    if shard:
        scaled = change = U = None
    yield column_sum, row_sum
    _average_(state["instability_column"], column_sum / count + eps2, beta3, skip)  # C_t
    row, column = _factored_rsqrt(state["instability_row"], row_sum / count, state["instability_column"])

    row, column = row.masked_fill_(skip, 0.0), column.masked_fill_(skip, 0.0)
    update = torch.mul(m, row[:, None], out=U)
    _decay_(parameter, group, skip)
    update, column = update.view(parameter.shape), column.view(parameter.shape[1:])
    parameter.addcmul_(update, column, value=-group["lr"])  # θ_t


def _update_vector_(parameter: Tensor, state: dict, group: dict, skip: Tensor, rows: Rows | None) -> Update:
    beta1, beta2, _ = group["betas"]
    g = parameter.grad
    m = state["momentum"]
    count = g.numel() if rows is None else rows.count
    _average_(state["square"], g.square() + group["eps"][0], beta2, skip)
    u = g * state["square"].rsqrt()
    u_square_sum = u.square().sum()
    yield (u_square_sum,)
    rms = (u_square_sum / count).sqrt()
    u = u / (rms / group["clip_threshold"]).clamp(min=1.0)  # û = u / max(1, RMS(u)/d)
    _average_(m, u, beta1, skip)
    _decay_(parameter, group, skip)
    parameter.sub_(m.masked_fill(skip, 0.0), alpha=group["lr"])


def _average_(average: Tensor, value: Tensor, beta: float, skip: Tensor) -> None:
    """β · average + (1 − β) · value, or the average itself, to the bit, where the update is skipped."""
    average.lerp_(torch.where(skip, average, value), 1 - beta)


def _factored_rsqrt(row: Tensor, row_mean: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """a, b with a · bᵀ = 1/√(r · cᵀ / mean(r)): no root of the product, which underflows float32."""
    return (row / row_mean).rsqrt(), column.rsqrt()


def _decay_(parameter: Tensor, group: dict, skip: Tensor) -> None:
    if rate := group["lr"] * group["weight_decay"]:
        parameter.mul_(1 - rate * skip.logical_not().to(parameter.dtype))
