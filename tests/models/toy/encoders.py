"""Words by their hash, pictures by the mean of 8×8 pixels."""

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from sprint.models.encoders import Family

VOCABULARY = 64


class ToyTokenizer:
    """0 is padding."""

    def __call__(self, text: str) -> list[int]:
        return [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in re.findall(r"\w+", text)] or [1]

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "vocabulary.json").write_text(json.dumps({"size": VOCABULARY}))


class ToyText(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, words: int):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, words)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


class ToyPixels(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, cell: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class ToyEncoders(Family):
    @property
    def downscale(self) -> int:
        return downscale(self.autoencoder.config)

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor, int]:
        ids = torch.zeros(len(prompts), self.max_length, dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            words = self.tokenizer(prompt)[: self.max_length]
            row[: len(words)] = torch.tensor(words)
        mask = (ids > 0).long()
        return ids, mask, int(mask.sum(1).max())

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.text_encoder(ids)

    def to_latents(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x.float(), self.downscale) * self.autoencoder.scale

    def to_pictures(self, latent: Tensor) -> Tensor:
        return F.interpolate(latent.float() / self.autoencoder.scale, scale_factor=float(self.downscale))


def load_encoders(folder: str, max_length: int, instruction: bool, dtype: torch.dtype) -> ToyEncoders:
    return ToyEncoders(
        ToyTokenizer(),
        ToyText.from_pretrained(folder, subfolder="text_encoder", torch_dtype=dtype),
        ToyPixels.from_pretrained(folder, subfolder="vae", torch_dtype=dtype),
        max_length,
        instruction,
    )


def downscale(autoencoder: Mapping | None) -> int:
    return autoencoder["cell"] if autoencoder else 8
