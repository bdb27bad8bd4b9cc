"""A flow-matching network seen through TrigFlow: the same weights, another clock. Nothing is trained."""

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from sprint.maths.trigflow import flow_time, to_flow_input, to_trig_velocity
from sprint.models.families import family_of
from sprint.models.teacher import DENSE_TIME, Sizes


class TrigFlowView(nn.Module):
    """F(x_hat, t) of a network that predicts the flow-matching velocity v(x_fm, t_fm).

    network      of one of the `sprint.models.families`
    time_scale   what multiplies t_fm before the network's time embedder (SPARSE_TIME or DENSE_TIME)

    The network runs in its own dtype; time, x_fm and F are in the dtype of `x_hat` and at least float32.
    """

    def __init__(self, network: ModelMixin, time_scale: float):
        super().__init__()
        self.network = network
        self.teacher = family_of(network)
        self.time_scale = time_scale

    @property
    def sizes(self) -> Sizes:
        return self.teacher.sizes(self.network.config)

    def flow_velocity(
        self, x_fm: Tensor, t_fm: Tensor, text: Tensor, mask: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """The network's own prediction, as a flow velocity.

        x_fm [B, C, H, W]; t_fm [B] in [0, 1]; text [B, T, D]; mask [B, T], 1 where a token is real;
        guidance [B], the plain scale (4.5, say), for networks that embed it.  -> v [B, C, H, W]
        """
        dtype = self.network.dtype
        v = self.teacher.velocity(
            self.network, x_fm.to(dtype), t_fm, text.to(dtype), mask, guidance, self.time_scale
        )
        return v.to(torch.promote_types(x_fm.dtype, torch.float32))

    def forward(
        self, x_hat: Tensor, t: Tensor, text: Tensor, mask: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """F(x_hat, t): x_hat = x_t/σ_d [B, C, H, W]; t [B] in [0, π/2].  -> [B, C, H, W]"""
        t_fm = flow_time(t)
        x_fm = to_flow_input(x_hat, t_fm)
        return to_trig_velocity(self.flow_velocity(x_fm, t_fm, text, mask, guidance), x_fm, t_fm)


class FlowVelocity(nn.Module):
    """`TrigFlowView.flow_velocity` as a module's call, which is where an engine's hooks sit."""

    def __init__(self, network: ModelMixin, time_scale: float = DENSE_TIME):
        super().__init__()
        self.view = TrigFlowView(network, time_scale)

    def forward(self, x_fm: Tensor, t_fm: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return self.view.flow_velocity(x_fm, t_fm, text, mask)
