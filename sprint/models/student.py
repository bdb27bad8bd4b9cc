"""The student: the adapted teacher's weights, an embedded guidance scale, and a learned log-variance."""

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from sprint.maths.dual import value_of
from sprint.maths.trigflow import flow_time
from sprint.models.families import family_of
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView


class Student(nn.Module):
    """F_θ(x_hat, t | text, guidance) and logvar_φ(t).

    network     a teacher's, with QK-norm and a guidance embedder: `from_adapted`
    time_scale  as of `TrigFlowView`; what is exported is in dense time
    logvar      Linear(width, 1) on the time embedding; lives in training only
    """

    def __init__(self, network: ModelMixin, time_scale: float = DENSE_TIME):
        super().__init__()
        self.view = TrigFlowView(network, time_scale)
        self.logvar = nn.Linear(self.view.sizes.width, 1)
        nn.init.zeros_(self.logvar.weight)
        nn.init.zeros_(self.logvar.bias)

    @property
    def network(self) -> ModelMixin:
        return self.view.network

    def forward(self, x_hat: Tensor, t: Tensor, text: Tensor, mask: Tensor, guidance: Tensor) -> Tensor:
        """x_hat = x_t/σ_d [B, C, H, W]; t, guidance [B].  -> F [B, C, H, W]"""
        return self.view(x_hat, t, text, mask, guidance)

    def log_variance(self, t: Tensor, guidance: Tensor) -> Tensor:
        """The adaptive weight's exponent, from the network's own embedding of (t, guidance).  -> [B]"""
        view = self.view
        embedded = view.teacher.embed_time(view.network, flow_time(t), guidance, view.time_scale)
        with torch.autocast(embedded.device.type, enabled=False):
            return self.logvar(embedded.to(self.logvar.weight.dtype)).squeeze(1)

    @torch.no_grad()
    def start_log_variance(self, t: Tensor, guidance: Tensor, target: Tensor, ridge: float = 10.0) -> None:
        """Fit the head to `target` [N] at times t [N], so that the loss starts balanced.

        Least squares, with a strong ridge: small weights, since the embedding moves while it trains.
        """
        self.logvar.weight.zero_()
        rows: list[Tensor] = []
        handle = self.logvar.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].double()))
        self.log_variance(t, guidance)
        handle.remove()
        x, y = rows[0], target.double()
        centred = x - x.mean(0)
        gram = centred.T @ centred / len(x)
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(gram, centred.T @ (y - y.mean()) / len(x))
        self.logvar.weight.copy_(weight[None])
        self.logvar.bias.copy_(y.mean() - x.mean(0) @ weight)


class TrainedStudent(nn.Module):
    """F and log-variance in one call of one module: an engine's hooks sit on the outermost call."""

    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(
        self, x_hat: Tensor, t: Tensor, text: Tensor, mask: Tensor, guidance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Student`; x_hat and t may be duals, and then F is one.  -> F [B, C, H, W], logvar [B]"""
        logvar = self.student.log_variance(value_of(t), guidance)
        return self.student(x_hat, t, text, mask, guidance), logvar


def from_adapted(adapted: ModelMixin) -> ModelMixin:
    """The adapted weights in a network that also embeds guidance; at the start it has no effect."""
    return family_of(adapted).student_of(adapted)
