"""Classifier-free guidance in TrigFlow terms."""

import torch
from torch import Tensor

from sprint.models.view import TrigFlowView
from sprint.trigflow import expand_time


def guided_velocity(
    view: TrigFlowView,
    x_hat: Tensor,
    t: Tensor,
    text: Tensor,
    mask: Tensor,
    null_text: Tensor,
    null_mask: Tensor,
    guidance_scale: Tensor,
) -> Tensor:
    """F_u + w · (F_c − F_u), both branches in one call, each with its own mask.

    x_hat [B, C, H, W]; t, guidance_scale [B]; text [B, T, D], mask [B, T]; null_text [1, T, D],
    null_mask [1, T].  -> [B, C, H, W]
    """
    batch = len(x_hat)
    both_text = torch.cat([text, null_text.expand(batch, -1, -1)])
    both_mask = torch.cat([mask, null_mask.expand(batch, -1)])
    both = view(torch.cat([x_hat, x_hat]), torch.cat([t, t]), both_text, both_mask)
    F_c, F_u = both.chunk(2)
    return F_u + expand_time(guidance_scale, F_u) * (F_c - F_u)
