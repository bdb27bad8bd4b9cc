"""The score of the student's own samples: a network that learns what the student draws, as a teacher knows its data.

Called as the student is: (x_hat, t, text, mask, guidance) -> F [B, C, H, W].
"""

from diffusers import ModelMixin
from torch import Tensor, nn

from sprint.models.families import family_of
from sprint.models.low_rank import add_low_rank, twin
from sprint.models.student import from_adapted
from sprint.models.view import TrigFlowView


class FakeScore(nn.Module):
    """A network of its own, which begins as the adapted teacher. As the student it is told the guidance scale, since
    each scale has samples of its own.
    """

    def __init__(self, adapted: ModelMixin, time_scale: float):
        super().__init__()
        self.view = TrigFlowView(from_adapted(adapted), time_scale)

    @property
    def network(self) -> ModelMixin:
        return self.view.network

    def forward(self, x_hat: Tensor, t: Tensor, text: Tensor, mask: Tensor, guidance: Tensor) -> Tensor:
        return self.view(x_hat, t, text, mask, guidance)


class LowRankFakeScore(nn.Module):
    """Additions of low rank in the blocks of the adapted teacher, whose weights it shares and leaves alone.

    It is not told the guidance scale: of several it learns the mixture. Its parameters are the additions alone; the
    network below them is the engine's to place, as a frozen one.
    """

    def __init__(self, adapted: ModelMixin, rank: int, time_scale: float):
        super().__init__()
        network = twin(adapted)
        self.additions = add_low_rank(family_of(network).blocks(network), rank)
        self._view = (
            TrigFlowView(network, time_scale),
        )  # in a tuple, so that its weights are not this module's

    @property
    def network(self) -> ModelMixin:
        return self._view[0].network

    def forward(self, x_hat: Tensor, t: Tensor, text: Tensor, mask: Tensor, guidance: Tensor) -> Tensor:
        return self._view[0](x_hat, t, text, mask)
