"""Token features from inside the frozen teacher, for the discriminator."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sprint.base.errors import SprintError
from sprint.models.view import TrigFlowView


class TappedTeacher:
    """(x_hat, t, text, mask) -> outputs of the tapped transformer blocks, one [B, N, C] each.

    view   the teacher seen through TrigFlow; frozen here: evaluation mode, no parameter takes a gradient
    taps   block numbers from 0, in the order in which their features are wanted

    Gradients flow through the frozen blocks to `x_hat`. Blocks after the last tap are not computed.
    Raises SprintError as `check_taps`.
    """

    def __init__(self, view: TrigFlowView, taps: Sequence[int]):
        check_taps(taps, view.sizes.depth)
        self.view = view.eval().requires_grad_(False)
        self.taps = tuple(taps)

    def __call__(self, x_hat: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> list[Tensor]:
        """x_hat = x_t/σ_d [B, C, H, W]; t [B] in [0, π/2]; text [B, T, D]; mask [B, T].

        -> features in the order of `taps`, in the dtype of `x_hat` and at least float32
        """
        with _recorded(self.view, self.taps) as features:
            self.view(x_hat, t, text, mask)
        dtype = torch.promote_types(x_hat.dtype, torch.float32)
        return [features[tap].to(dtype) for tap in self.taps]


def check_taps(taps: Sequence[int], depth: int) -> None:
    """Raise SprintError for no tap, or one outside of a teacher of `depth` blocks."""
    if not taps or not all(0 <= tap < depth for tap in taps):
        raise SprintError(
            f"distill.adversarial.taps = {list(taps)}, but the teacher's blocks are 0 to {depth - 1}"
        )


@contextmanager
def _recorded(view: TrigFlowView, taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """A dict that fills with the outputs of the tapped blocks; inside, the network ends after the last of them."""
    features: dict[int, Tensor] = {}
    teacher, network = view.teacher, view.network

    def record(tap: int):
        def hook(block: nn.Module, inputs: tuple, output) -> None:
            features[tap] = teacher.tokens(output)

        return hook

    blocks = teacher.blocks(network)
    handles = [blocks[tap].register_forward_hook(record(tap)) for tap in sorted(set(taps))]
    try:
        with teacher.only_first(network, max(taps) + 1):
            yield features
    finally:
        for handle in handles:
            handle.remove()
