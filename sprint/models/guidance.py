"""Classifier-free guidance in TrigFlow terms."""

from typing import NamedTuple

import torch
from torch import Tensor

from sprint.maths.trigflow import expand_time
from sprint.models.view import TrigFlowView


class GuidedText(NamedTuple):
    """The prompts of a batch of B, then the null prompt B times, each with its mask.

    text [2B, T, D]; mask [2B, T]
    """

    text: Tensor
    mask: Tensor


def with_null(text: Tensor, mask: Tensor, null_text: Tensor, null_mask: Tensor) -> GuidedText:
    """text [B, T, D], mask [B, T]; null_text [1, N, D], null_mask [1, N], of which the first T ≤ N are used."""
    batch, length = mask.shape
    null_text, null_mask = null_text[:, :length], null_mask[:, :length]
    return GuidedText(
        torch.cat([text, null_text.expand(batch, -1, -1)]), torch.cat([mask, null_mask.expand(batch, -1)])
    )


def with_null_under_prompts_mask(
    text: Tensor, mask: Tensor, null_text: Tensor, null_mask: Tensor
) -> GuidedText:
    """As `with_null`, but a null prompt shows as many tokens as the prompt beside it, those behind its end included."""
    return GuidedText(with_null(text, mask, null_text, null_mask).text, torch.cat([mask, mask]))


def guided_velocity(
    view: TrigFlowView, x_hat: Tensor, t: Tensor, guided: GuidedText, guidance_scale: Tensor
) -> Tensor:
    """F_u + w · (F_c − F_u), both branches in one call.

    x_hat [B, C, H, W]; t, guidance_scale [B].  -> [B, C, H, W]
    """
    both = view(torch.cat([x_hat, x_hat]), torch.cat([t, t]), guided.text, guided.mask)
    F_c, F_u = both.chunk(2)
    return F_u + expand_time(guidance_scale, F_u) * (F_c - F_u)
