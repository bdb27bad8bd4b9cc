"""Activation checkpointing that knows duals: the backward pass recomputes values and leaves tangents alone."""

from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from sprint.maths.dual import Dual, value_of


def is_dual(x) -> bool:
    return isinstance(x, Dual)


def recompute_in_backward(block: nn.Module, *args):
    """block(*args), of which the backward keeps the inputs' values alone and runs the rest once more.

    For `network.enable_gradient_checkpointing(gradient_checkpointing_func=recompute_in_backward)`. Where
    arguments are duals, tangents take part in the first run only, and nothing of them is kept. A block must
    not draw random numbers: no dropout. It may give one tensor or several.
    """
    leaves, spec = tree_flatten(args, is_leaf=is_dual)
    tangents = {i: leaf.tangent for i, leaf in enumerate(leaves) if is_dual(leaf)}
    if not tangents:
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    first_run: list = []  # what the block gave: tangents or None, and their structure

    def run(*values):
        if first_run:  # the recomputation
            return tuple(tree_flatten(block(*tree_unflatten(values, spec)))[0])
        duals = [Dual(x, tangents[i]) if i in tangents else x for i, x in enumerate(values)]
        out, out_spec = tree_flatten(block(*tree_unflatten(duals, spec)), is_leaf=is_dual)
        tangents.clear()
        first_run.extend(([x.tangent if is_dual(x) else None for x in out], out_spec))
        return tuple(map(value_of, out))

    out = checkpoint(run, *map(value_of, leaves), use_reentrant=False, preserve_rng_state=False)
    tangents_out, out_spec = first_run
    first_run[0] = None  # not kept until the backward
    duals = [x if dx is None else Dual(x, dx) for x, dx in zip(out, tangents_out, strict=True)]
    return tree_unflatten(duals, out_spec)
