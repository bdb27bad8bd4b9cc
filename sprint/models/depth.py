"""Students of another depth than their teacher: a network made of the blocks of one that is there.

Source: SANA-1.5 (arXiv 2501.18427), whose 4.8B was grown from 1.6B by blocks that start as the identity. Ours differ
in what such a block is made of: a copy of an old one with its output projections at zero, as the "cyclic" start of
its public code, where the paper draws new weights; and no block of the old ones is dropped before.
"""

from collections.abc import Sequence

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from sprint.base.errors import SprintError
from sprint.models.families import family_of


def check_depth(depth: int, own: int) -> None:
    """Raise SprintError for a student that would be shallower than its teacher, of `own` blocks; 0 is as deep."""
    if 0 < depth < own:
        raise SprintError(
            f"distill.depth = {depth}, but the teacher has {own} blocks: a student has as many (0), or more"
        )


def depth_words(own: int, teachers: int) -> str:
    """ "8 blocks, its teacher 4"; "" for a student as deep as its teacher."""
    return "" if own == teachers else f"{own} blocks, its teacher {teachers}"


def grown(network: ModelMixin, depth: int) -> ModelMixin:
    """The network with new blocks behind its own, `depth` in all; where 0 or its own depth is asked for, itself.

    New block i is a copy of block i mod (old depth) that starts as the identity, so that value and tangent are the
    network's own bit for bit. At the first update only its output projections have a gradient, from the second on
    the rest of it. The old blocks share the network's memory. Raises SprintError as `check_depth`.
    """
    own = family_of(network).sizes(network.config).depth
    check_depth(depth, own)
    if depth in (0, own):
        return network
    larger = with_blocks(network, [i % own for i in range(depth)])
    for block in family_of(network).blocks(larger)[own:]:
        start_as_identity(network, block)
    return larger


def with_blocks(network: ModelMixin, order: Sequence[int]) -> ModelMixin:
    """A network whose block i is the given one's block order[i], and whose ends are the given one's.

    What is there once shares memory with `network`; a block's second and later places get copies. No random number is
    drawn, so that what is made afterwards does not depend on the depth.
    """
    family, state = family_of(network), network.state_dict()
    blocks, used = family.blocks(network), set()
    prefix = next(name for name, module in network.named_modules() if module is blocks) + "."
    weights: dict[str, Tensor] = {key: value for key, value in state.items() if not key.startswith(prefix)}
    for place, source in enumerate(order):
        for name, value in blocks[source].state_dict().items():
            weights[f"{prefix}{place}.{name}"] = value.clone() if source in used else value
        used.add(source)
    with torch.random.fork_rng(devices=[]):
        made = family.empty_network(family.with_depth(network.config, len(order)))
    made.load_state_dict(weights, strict=True, assign=True)
    return made.train(network.training)


@torch.no_grad()
def start_as_identity(network: ModelMixin, block: nn.Module) -> None:
    """Make `block`, of a network of that family, hand its tokens on as they are."""
    for name in family_of(network).output_projections(block):
        block.get_parameter(name).zero_()
