"""Gemma-2 and the deep-compression autoencoder, as diffusers' Sana pipelines use them.

Prompts are in lower case, optionally behind the "complex human instruction". (Sana, arXiv 2410.10629, §3.3)
"""

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from diffusers import AutoencoderDC, SanaSprintPipeline
from pydantic import Field, Strict
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sprint.base.door import held_against
from sprint.base.errors import SprintError
from sprint.models.encoders import Family
from sprint.models.parts import check_room

Scale = Annotated[float, Strict(), Field(gt=0, lt=1e6)]
log = logging.getLogger(__name__)
DC_AE_DOWNSCALE = 32  # pixels per latent cell of the public autoencoder


class SanaEncoders(Family):
    """Text side and autoencoder of one Sana folder. Latents are scaling_factor · encoding."""

    @property
    def downscale(self) -> int:
        return downscale_of(self.autoencoder.config)

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor, int]:
        return tokenize(self.tokenizer, prompts, self.max_length, self.instruction)

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.text_encoder(ids, attention_mask=mask, use_cache=False)[0]

    def to_latents(self, x: Tensor) -> Tensor:
        return self.autoencoder.encode(x).latent.float() * self.autoencoder.config.scaling_factor

    def to_pictures(self, latent: Tensor) -> Tensor:
        return self.autoencoder.decode(latent / self.autoencoder.config.scaling_factor).sample.float()


def downscale_of(config: Mapping) -> int:
    return 2 ** (len(config["encoder_block_out_channels"]) - 1)


def downscale(autoencoder: Mapping | None) -> int:
    """Of its config, or of the public one."""
    return downscale_of(autoencoder) if autoencoder else DC_AE_DOWNSCALE


def human_instruction() -> list[str]:
    """The lines that diffusers' Sana pipelines put before every prompt."""
    call = inspect.signature(SanaSprintPipeline.__call__)
    return list(call.parameters["complex_human_instruction"].default)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_length: int, instruction: bool
) -> tuple[Tensor, Tensor, int]:
    """-> ids, mask [B, L] with L = max_length (and the instruction's length on top, if asked for), longest of B.

    Longer prompts are cut with a warning.
    """
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


def load_encoders(folder: str, max_length: int, instruction: bool, dtype: torch.dtype) -> SanaEncoders:
    """From a folder or hub id: nothing that lies there is executed. Raises what the libraries raise where a part is
    missing or wrong, and SprintError where a part's weights are not complete.
    """
    told, safe = {"output_loading_info": True}, {"trust_remote_code": False}
    if Path(folder).is_dir():
        config = AutoConfig.from_pretrained(folder, subfolder="text_encoder", trust_remote_code=False)
        check_room(Path(folder), "text_encoder", lambda: AutoModel.from_config(config, **safe))
        check_room(
            Path(folder),
            "vae",
            lambda: AutoencoderDC.from_config(AutoencoderDC.load_config(folder, subfolder="vae")),
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer", trust_remote_code=False)
    text_encoder, loading = AutoModel.from_pretrained(
        folder, subfolder="text_encoder", dtype=dtype, trust_remote_code=False, weights_only=True, **told
    )
    _check_complete("text_encoder", loading)
    autoencoder, loading = AutoencoderDC.from_pretrained(folder, subfolder="vae", torch_dtype=dtype, **told)
    _check_complete("vae", loading)
    _check_tokens(tokenizer, text_encoder)
    held_against(Scale, autoencoder.config.scaling_factor, "vae/config.json: scaling_factor")
    return SanaEncoders(tokenizer, text_encoder, autoencoder, max_length, instruction)


def _check_tokens(tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel) -> None:
    """A token that the encoder has no row for would end in a lookup out of range, on a GPU in a lost device.

    Settings of a tokenizer that are of no use show only when it is called, so it is: raises what it raises.
    """
    tokenizer(["a"])
    highest, rows = max(tokenizer.get_vocab().values(), default=0), text_encoder.config.vocab_size
    if highest >= rows:
        raise SprintError(
            f"the tokenizer has a token {highest}, and the text encoder knows {rows} tokens: they are not of one model"
        )


def _check_complete(part: str, loading: Mapping) -> None:
    """A weight that its file lacks would be random."""
    if missing := sorted(loading["missing_keys"]):
        raise SprintError(f"{len(missing)} weights of {part} are not in its files, such as {missing[0]}")
