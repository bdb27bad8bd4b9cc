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
    Raises SprintError for no tap, or one outside the network.
    """

    def __init__(self, view: TrigFlowView, taps: Sequence[int]):
        depth = len(view.network.transformer_blocks)
        if not taps:
            raise SprintError("adversarial.taps is empty: name at least one block of the teacher")
        for tap in taps:
            if not 0 <= tap < depth:
                raise SprintError(
                    f"adversarial.taps: no block {tap} in the teacher, which has {depth} (0 to {depth - 1})"
                )
        self.view = view.eval().requires_grad_(False)
        self.taps = tuple(taps)

    def __call__(self, x_hat: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> list[Tensor]:
        """x_hat = x_t/σ_d [B, C, H, W]; t [B] in [0, π/2]; text [B, T, D]; mask [B, T].

        -> features in the order of `taps`, in the dtype of `x_hat` and at least float32
        """
        with _recorded(self.view.network, self.taps) as features:
            self.view(x_hat, t, text, mask)
        dtype = torch.promote_types(x_hat.dtype, torch.float32)
        return [features[tap].to(dtype) for tap in self.taps]


@contextmanager
def _recorded(network: nn.Module, taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """A dict that fills with the outputs of the tapped blocks; inside, the network ends after the last of them.

    The list of blocks is cut short, rather than the forward left by an exception: FSDP gathers weights before a
    forward and frees them in a hook after it, which has to run. The layers behind the blocks cost little.
    """
    features: dict[int, Tensor] = {}
    blocks = network.transformer_blocks

    def record(tap: int):
        def hook(block: nn.Module, inputs: tuple, output: Tensor) -> None:
            features[tap] = output

        return hook

    handles = [blocks[tap].register_forward_hook(record(tap)) for tap in sorted(set(taps))]
    network.transformer_blocks = blocks[: max(taps) + 1]
    try:
        yield features
    finally:
        network.transformer_blocks = blocks
        for handle in handles:
            handle.remove()
