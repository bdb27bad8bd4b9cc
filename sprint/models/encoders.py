"""What stands around the network: tokenizer, text encoder and autoencoder; how each family reads and decodes.

Prompts are right-padded, and may be read behind a family's own instruction, of which token 0 is kept: token 0
and the last `max_length − 1` come out.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sprint.base.errors import SprintError
from sprint.base.finite import is_finite
from sprint.base.products import use_products
from sprint.base.random import on_device

TEXT_UNIT = 16  # trimmed text comes in multiples of it: few different lengths
PIXELS_AT_ONCE = {"cpu": 2**16, "cuda": 2**20}  # decoded together: measured on a CPU, a guess for GPUs


@dataclass
class Family(ABC):
    """Frozen text side and autoencoder of one folder."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: PreTrainedModel
    autoencoder: nn.Module
    max_length: int = 300
    instruction: bool = True

    # ---- what a family of teachers says -----------------------------------------------------------------

    @property
    @abstractmethod
    def downscale(self) -> int:
        """Pixels per latent cell."""

    @abstractmethod
    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor, int]:
        """-> ids, mask [B, L] with L = max_length (and the instruction's length on top), longest of B"""

    @abstractmethod
    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What the network reads of a text, [B, L, D]; tokens see only those before them."""

    @abstractmethod
    def to_latents(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] from −1 to 1 -> unit-scale latents"""

    @abstractmethod
    def to_pictures(self, latent: Tensor) -> Tensor:
        """The inverse of `to_latents`, as nearly as there is one."""

    # ---- what follows from it -----------------------------------------------------------------------------

    def to(self, device: torch.device) -> "Family":
        for part in (self.text_encoder, self.autoencoder):
            use_products(part.to(device))
        return self

    def text_to(self, device: torch.device) -> "Family":
        """The text side alone, where there are no pictures to encode or decode; the autoencoder stays where it is."""
        use_products(self.text_encoder.to(device))
        return self

    @property
    def device(self) -> torch.device:
        """Where texts are read."""
        return self.text_encoder.device

    def channels_last(self) -> "Family":
        """The autoencoder's weights laid out as its convolutions and its norms over channels read them.

        The same values; but safetensors does not save them so.
        """
        self.autoencoder.to(memory_format=torch.channels_last)
        return self

    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """-> text [B, max_length, D], mask [B, max_length]; longer prompts are cut with a warning."""
        ids, mask, _ = self.tokenize(prompts)
        return self._encode(ids, mask, self.max_length)

    def encode_trimmed(self, prompts: list[str], unit: int = TEXT_UNIT) -> tuple[Tensor, Tensor]:
        """As `encode_prompts`, less the padding that stands behind the longest prompt and changes no picture.

        -> text [B, T, D], mask [B, T], where T is a multiple of `unit`, or max_length
        """
        ids, mask, longest = self.tokenize(prompts)
        longest -= ids.shape[1] - self.max_length
        return self._encode(ids, mask, min(max(math.ceil(longest / unit), 1) * unit, self.max_length))

    @torch.no_grad()
    def _encode(self, ids: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Token 0 and the next `length − 1` after the instruction. Tokens see only those before them."""
        behind = ids.shape[1] - self.max_length
        ids, mask = (on_device(x[:, : behind + length], self.device) for x in (ids, mask))
        text = self.states(ids, mask)
        return tuple(torch.cat([x[:, :1], x[:, behind + 1 :]], dim=1) for x in (text, mask))

    @torch.no_grad()
    def encode_pictures(self, pictures: np.ndarray) -> Tensor:
        """uint8 [B, H, W, 3] -> unit-scale latents [B, C, H/down, W/down], float32"""
        x = on_device(torch.from_numpy(pictures), self.autoencoder.device).permute(0, 3, 1, 2)
        x = (x.float() / 127.5 - 1).to(self.autoencoder.dtype)
        return self.to_latents(x)

    @torch.no_grad()
    def decode_latents(self, latent: Tensor) -> np.ndarray:
        """Unit-scale latents [B, C, h, w] -> uint8 [B, H, W, 3], decoded a few at a time: faster, and less memory.

        Raises SprintError where the autoencoder gives values that are not finite.
        """
        pixels = latent.shape[2] * latent.shape[3] * self.downscale**2
        at_once = max(1, PIXELS_AT_ONCE.get(self.autoencoder.device.type, pixels) // pixels)
        return torch.cat([self._decode(some) for some in latent.split(at_once)]).cpu().numpy()

    def _decode(self, latent: Tensor) -> Tensor:
        """-> uint8 [B, H, W, 3], on the device"""
        x = self.to_pictures(latent.to(self.autoencoder.dtype))
        if not is_finite(x):
            raise SprintError(
                "the autoencoder gives values that are not finite; no picture can be made of them"
            )
        x = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (x * 255).round().to(torch.uint8)


def encode_null(family: Family) -> tuple[Tensor, Tensor]:
    """The empty prompt with its own mask, never behind the instruction.

    -> text [1, max_length, D], mask [1, max_length]
    """
    return replace(family, instruction=False).encode_prompts([""])
