"""Transformer blocks through torch.compile: plain forwards and duals, with gradients and without.

`torch.compile` of code that builds `Dual`s is not safe: it breaks the graph and may return wrong values
without a word. So a block is first traced by `make_fx` on fake tensors, where a dual is two tensors and
everything that Python decides is decided, and the graph of plain operations is compiled whole. The blocks
of a network are alike and share their graphs: one for each way in which blocks are called.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch import config as functorch_config
from torch._inductor.exc import InductorError
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sprint.base.errors import SprintError
from sprint.engine.recompute import is_dual, recompute_in_backward
from sprint.maths.dual import Dual
from sprint.models.families import family_of


def prepare_blocks(network: nn.Module, compiled: bool, recompute: bool) -> None:
    """Blocks compiled, recomputed in the backward pass, both, or as they are."""
    if compiled:
        compile_blocks(network, recompute)
    elif recompute:
        network.enable_gradient_checkpointing(gradient_checkpointing_func=recompute_in_backward)


def compile_blocks(network: nn.Module, recompute: bool = False) -> "BlockCompiler":
    """Have every block of `network` run compiled, from its next call on.

    recompute   keep a block's inputs alone for the backward pass, which computes the rest once more: what
                activation checkpointing does, by the compiler (do not switch on both)

    Hooks on the blocks fire as before. The first call of each kind takes a while: some 20 s on two CPU cores.
    Raises SprintError then, if there is no working compiler.
    """
    compiler = BlockCompiler(recompute)
    for block in family_of(network).blocks(network):
        block.forward = partial(compiler.run, _Eager(block))
    return compiler


class _Eager(nn.Module):
    """A block with the forward that it had, out of reach of the hooks of the block's own call."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.original = block, block.forward

    def forward(self, *args):
        return self.original(*args)


class BlockCompiler:
    """Compiled graphs of blocks that differ in their weights alone.

    graphs   one for each kind of call: structure of the arguments (duals or not), shapes and dtypes, which
             tensors and weights take a gradient, grad mode, autocast
    """

    def __init__(self, recompute: bool = False):
        self.recompute = recompute
        self.graphs: dict[tuple, _Graph] = {}

    def run(self, eager: _Eager, *args):
        """What the block itself would give for `args`; tangents come without a graph."""
        weights = dict(eager.named_parameters())
        leaves, structure = tree_flatten(args)
        leaves = [leaf.contiguous() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        kind = (
            structure,
            tuple(_described(leaf) for leaf in (*leaves, *weights.values())),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(next(iter(weights.values())).device.type),
        )
        if kind not in self.graphs:
            self.graphs[kind] = _Graph(eager, list(weights), leaves, structure)
        inputs = [*weights.values(), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        return self.graphs[kind](inputs, self.recompute)


class _Graph:
    """One kind of call, traced at the first and compiled."""

    def __init__(self, eager: _Eager, names: list[str], leaves: list, structure):
        self.eager, self.names, self.leaves, self.structure = eager, names, leaves, structure
        self.compiled: Callable | None = None

    def __call__(self, inputs: list[Tensor], recompute: bool):
        if self.compiled is not None:
            return tree_unflatten(self.compiled(*inputs), self.out_structure)
        budget = 0.0 if recompute else functorch_config.activation_memory_budget
        try:
            graph = make_fx(self._flat, tracing_mode="fake")(*inputs)
            compiled = torch.compile(graph, fullgraph=True, dynamic=False)
            with functorch_config.patch(activation_memory_budget=budget):
                out = compiled(*inputs)
        except (BackendCompilerFailed, InductorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise SprintError(f"compile: torch.compile failed ({reason}); run with compile=false") from error
        self.compiled = compiled
        self.eager = self.leaves = None
        return tree_unflatten(out, self.out_structure)

    def _flat(self, *inputs: Tensor) -> list[Tensor]:
        """The block as a function of tensors alone: weights, then arguments."""
        count = len(self.names)
        given = iter(inputs[count:])
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        weights = dict(zip(self.names, inputs[:count], strict=True))
        out = functional_call(self.eager, weights, tuple(tree_unflatten(leaves, self.structure)))
        out = tree_map(_without_graph, out, is_leaf=is_dual)
        flat, self.out_structure = tree_flatten(out)
        return flat


def _without_graph(leaf):
    return Dual(leaf.value, leaf.tangent.detach()) if is_dual(leaf) else leaf


def _described(leaf):
    if not isinstance(leaf, Tensor):
        return leaf
    return tuple(leaf.shape), leaf.dtype, leaf.device, leaf.requires_grad
