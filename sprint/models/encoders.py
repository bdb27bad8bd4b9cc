"""What stands around the network: tokenizer, text encoder and autoencoder of a diffusers Sana folder.

Prompts are encoded exactly as diffusers' Sana pipelines do: lower case, right padding, optionally behind
the "complex human instruction", keeping token 0 and the last `max_length − 1`. (Sana, arXiv 2410.10629, §3.3)
"""

import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import AutoencoderDC, SanaSprintPipeline
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sprint.base.cpu import use_onednn
from sprint.base.errors import SprintError
from sprint.base.names import resolve
from sprint.base.random import on_device

log = logging.getLogger(__name__)
TEXT_UNIT = 16  # trimmed text comes in multiples of it: few different lengths
PIXELS_AT_ONCE = {"cpu": 2**16, "cuda": 2**20}  # decoded together: measured on a CPU, a guess for GPUs


def human_instruction() -> list[str]:
    """The lines that diffusers' Sana pipelines put before every prompt."""
    call = inspect.signature(SanaSprintPipeline.__call__)
    return list(call.parameters["complex_human_instruction"].default)


@dataclass
class Family:
    """Frozen text side and autoencoder of one Sana folder."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: PreTrainedModel
    autoencoder: AutoencoderDC
    max_length: int = 300
    instruction: bool = True

    def to(self, device: torch.device) -> "Family":
        for part in (self.text_encoder, self.autoencoder):
            use_onednn(part.to(device))
        return self

    @property
    def device(self) -> torch.device:
        return self.autoencoder.device

    @property
    def downscale(self) -> int:
        """Pixels per latent cell."""
        return downscale_of(self.autoencoder.config)

    def channels_last(self) -> "Family":
        """The autoencoder's weights laid out as its convolutions and its norms over channels read them.

        The same values; but safetensors does not save them so.
        """
        self.autoencoder.to(memory_format=torch.channels_last)
        return self

    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """-> text [B, max_length, D], mask [B, max_length]; longer prompts are cut with a warning."""
        ids, mask, _ = tokenize(self.tokenizer, prompts, self.max_length, self.instruction)
        return self._encode(ids, mask, self.max_length)

    def encode_trimmed(self, prompts: list[str], unit: int = TEXT_UNIT) -> tuple[Tensor, Tensor]:
        """As `encode_prompts`, less the padding that stands behind the longest prompt and changes no picture.

        -> text [B, T, D], mask [B, T], where T is a multiple of `unit`, or max_length
        """
        ids, mask, longest = tokenize(self.tokenizer, prompts, self.max_length, self.instruction)
        longest -= ids.shape[1] - self.max_length
        return self._encode(ids, mask, min(max(math.ceil(longest / unit), 1) * unit, self.max_length))

    @torch.no_grad()
    def _encode(self, ids: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Token 0 and the next `length − 1` after the instruction. Tokens see only those before them."""
        behind = ids.shape[1] - self.max_length
        ids, mask = (on_device(x[:, : behind + length], self.device) for x in (ids, mask))
        text = self.text_encoder(ids, attention_mask=mask, use_cache=False)[0]
        return tuple(torch.cat([x[:, :1], x[:, behind + 1 :]], dim=1) for x in (text, mask))

    @torch.no_grad()
    def encode_pictures(self, pictures: np.ndarray) -> Tensor:
        """uint8 [B, H, W, 3] -> unit-scale latents [B, C, H/down, W/down]: scaling_factor · encoding."""
        x = on_device(torch.from_numpy(pictures), self.device).permute(0, 3, 1, 2)
        x = (x.float() / 127.5 - 1).to(self.autoencoder.dtype)
        return self.autoencoder.encode(x).latent.float() * self.autoencoder.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latent: Tensor) -> np.ndarray:
        """Unit-scale latents [B, C, h, w] -> uint8 [B, H, W, 3], decoded a few at a time: faster, and less memory."""
        pixels = latent.shape[2] * latent.shape[3] * self.downscale**2
        at_once = max(1, PIXELS_AT_ONCE.get(self.device.type, pixels) // pixels)
        return torch.cat([self._decode(some) for some in latent.split(at_once)]).cpu().numpy()

    def _decode(self, latent: Tensor) -> Tensor:
        """-> uint8 [B, H, W, 3], on the device"""
        z = latent.to(self.autoencoder.dtype) / self.autoencoder.config.scaling_factor
        x = self.autoencoder.decode(z).sample.float()
        x = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (x * 255).round().to(torch.uint8)


def downscale_of(config: Mapping) -> int:
    """Pixels per latent cell of an autoencoder with this config."""
    return 2 ** (len(config["encoder_block_out_channels"]) - 1)


def encode_null(family: Family) -> tuple[Tensor, Tensor]:
    """The empty prompt with its own mask, never behind the instruction, as diffusers' Sana pipelines do.

    -> text [1, max_length, D], mask [1, max_length]
    """
    return replace(family, instruction=False).encode_prompts([""])


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_length: int, instruction: bool
) -> tuple[Tensor, Tensor, int]:
    """-> ids, mask [B, L] with L = max_length (and the instruction's length on top, if asked for), longest of B."""
    prefix = "\n".join(human_instruction()) if instruction else ""
    room = max_length + (len(tokenizer.encode(prefix)) - 2 if instruction else 0)
    tokenizer.padding_side = "right"
    texts = [prefix + prompt.lower().strip() for prompt in prompts]
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    for prompt, length in zip(prompts, lengths, strict=True):
        if length > room:
            log.warning("prompt cut to %d tokens: %.60s…", max_length, prompt)
    out = tokenizer(texts, padding="max_length", max_length=room, truncation=True, return_tensors="pt")
    return out.input_ids, out.attention_mask, min(max(lengths), room)


def load_family(
    name: str, max_length: int = 300, instruction: bool = True, dtype: torch.dtype = torch.float32
) -> Family:
    """Load the text side and autoencoder of a diffusers Sana pipeline folder, built-in name or hub id."""
    folder = resolve(name)
    try:
        family = Family(
            AutoTokenizer.from_pretrained(folder, subfolder="tokenizer"),
            AutoModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype),
            AutoencoderDC.from_pretrained(folder, subfolder="vae", torch_dtype=dtype),
            max_length,
            instruction,
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SprintError(
            f"{name}: no tokenizer, text_encoder and vae to load there; name a folder that has them "
            f"as teacher_family=… ({reason})"
        ) from error
    family.text_encoder.eval().requires_grad_(False)
    family.autoencoder.eval().requires_grad_(False)
    return family
