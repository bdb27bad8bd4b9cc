"""Low-rank additions to weights that stay as they are (LoRA, arXiv 2106.09685).

Not by a library: here an addition must stand on a network that another one goes on using, share its weights, and be
compiled, recomputed and checkpointed as the rest is. It is a parametrization, so whoever reads `layer.weight` gets the
sum, and nothing has to know of it.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization


class LowRank(nn.Module):
    """W -> W + B·A, W [out, in] or [out, in, 1, 1]; A [rank, in] random, B [out, rank] zero, both float32.

    The sum is in float32 or wider, under autocast too: a small B·A would be lost in bf16's eight bits.
    """

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        columns = weight.shape[1]
        like = {"device": weight.device, "dtype": torch.float32}
        self.A = nn.Parameter(torch.empty(rank, columns, **like).uniform_(-(columns**-0.5), columns**-0.5))
        self.B = nn.Parameter(torch.zeros(len(weight), rank, **like))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight.to(torch.promote_types(weight.dtype, self.A.dtype)) + (self.B @ self.A).view_as(
                weight
            )


def twin(network: nn.Module) -> nn.Module:
    """The same modules once more, over the same weights and buffers."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


def add_low_rank(module: nn.Module, rank: int) -> nn.ModuleList:
    """Give every linear layer and 1×1 convolution in `module` an addition of this rank, or of its own if that is less.

    -> the additions, whose parameters are all that is to be trained
    """
    layers = [layer for layer in module.modules() if _is_product(layer)]
    additions = nn.ModuleList()
    for layer in layers:
        additions.append(LowRank(layer.weight, min(rank, *layer.weight.shape[:2])))
        # unsafe: the sum is wider than a weight in bf16
        register_parametrization(layer, "weight", additions[-1], unsafe=True)
    return additions


def _is_product(layer: nn.Module) -> bool:
    pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear) or pointwise
