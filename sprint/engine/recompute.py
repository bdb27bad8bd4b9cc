"""Activation checkpointing that knows duals: the backward pass recomputes values and leaves tangents alone."""

from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from sprint.maths.dual import Dual, value_of


def recompute_in_backward(block: nn.Module, *args):
    """block(*args), of which the backward keeps the inputs' values alone and runs the rest once more.

    For `network.enable_gradient_checkpointing(gradient_checkpointing_func=recompute_in_backward)`. Where
    arguments are duals, tangents take part in the first run only, and nothing of them is kept. A block must
    not draw random numbers: no dropout.
    """
    leaves, spec = tree_flatten(args, is_leaf=lambda x: isinstance(x, Dual))
    tangents = {i: leaf.tangent for i, leaf in enumerate(leaves) if isinstance(leaf, Dual)}
    if not tangents:
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    result = []

    def run(*values):
        if not tangents:  # the recomputation
            return block(*tree_unflatten(values, spec))
        duals = [Dual(x, tangents[i]) if i in tangents else x for i, x in enumerate(values)]
        out = block(*tree_unflatten(duals, spec))
        tangents.clear()
        result.append(out.tangent)
        return out.value

    value = checkpoint(run, *map(value_of, leaves), use_reentrant=False, preserve_rng_state=False)
    return Dual(value, result.pop())
