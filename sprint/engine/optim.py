"""The two optimizers, their state, the warm-up and the clip. A stage asks for them with its own recipe settings.

Where weights are sharded, this process holds some of the rows (axis 0) of each, perhaps none, as a plain tensor.
AdamW works number by number and needs no more; CAME and the clip sum over the processes.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sprint.engine import came
from sprint.engine.came import CAME, Rows
from sprint.recipe.rules import check_betas
from sprint.recipe.schema import Optimizer as OptimizerSettings
from sprint.recipe.schema import OptimizerKind

Placement = Literal["like the weight", "by row", "whole"]

_PLACEMENTS: dict[str, Placement] = {
    "momentum": "like the weight",
    "square": "like the weight",
    "square_row": "by row",
    "square_column": "whole",
    "instability_row": "by row",
    "instability_column": "whole",
    "exp_avg": "like the weight",
    "exp_avg_sq": "like the weight",
    "step": "whole",
}


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    settings: OptimizerSettings,
    rows: Mapping[nn.Parameter, Rows] | None = None,
) -> torch.optim.Optimizer:
    """AdamW or CAME over `parameters`, with the settings of one network: generator and discriminator differ.

    rows  for each weight of which this process has a shard of the rows, how they lie; others are whole

    Both skip an update on the device where their attribute `found_inf` is 1.0 (`CAME` says more).
    Raises SprintError for a wrong number of betas, TypeError for half-precision weights, which small
    updates would not move.
    """
    parameters = list(parameters)
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters):
        raise TypeError("optimized weights must be float32 or float64; use autocast for bf16 compute")
    check_betas(settings)
    betas, decay = tuple(settings.betas), settings.weight_decay
    if settings.kind is OptimizerKind.came:
        return CAME(parameters, lr=settings.lr, betas=betas, weight_decay=decay, rows=rows)
    return torch.optim.AdamW(parameters, lr=settings.lr, betas=betas, weight_decay=decay, fused=True)


def start_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter] | None = None) -> None:
    """State for every weight that has none, as the first update would make it: checkpoints are read in place.

    optimizer   CAME, or AdamW with fused=True
    parameters  those it will be given, where its own list does not hold them yet
    """
    initial_state = came.initial_state if isinstance(optimizer, CAME) else _initial_adamw_state
    listed = (p for group in optimizer.param_groups for p in group["params"])
    for parameter in listed if parameters is None else parameters:
        if not optimizer.state[parameter]:
            optimizer.state[parameter].update(initial_state(parameter))


def _initial_adamw_state(parameter: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def placement(parameter_ndim: int, name: str) -> Placement:
    """How the entry `name` of an optimizer's state lies, for a weight whose rows lie over processes.

    "like the weight"  its axis 0 is the weight's; CAME's momentum of [out, ...] is [out, prod(...)]
    "by row"           one number for each row of the weight
    "whole"            the same on every process
    A weight without axes has no rows to spread. Raises KeyError for a name that neither optimizer keeps.
    """
    lies = _PLACEMENTS[name]
    return lies if parameter_ndim else "whole"


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


def clip_gradients(
    parameters: Iterable[nn.Parameter], clip_norm: float, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Scale gradients to a global L2 norm of at most `clip_norm`.  -> the norm before, a scalar.

    group  where gradients are shards: the processes over which each is spread once, without further copies of it

    A norm that is not finite is returned as it is, and the gradients are then unusable: skip the update.
    """
    if group is None:
        return nn.utils.clip_grad_norm_(parameters, clip_norm)
    parameters = [p for p in parameters if p.grad is not None]
    local = nn.utils.get_total_norm([p.grad for p in parameters])
    total = local.double().square()  # float32 would overflow above 1.8e19
    dist.all_reduce(total, group=group)
    norm = total.sqrt().to(local.dtype)
    nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm
