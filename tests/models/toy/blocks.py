"""The toy's network, what is where in it, and how it is called."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from sprint.models.teacher import QK

WAVES = 16


def waves(time: Tensor) -> Tensor:
    """[B] -> [B, 2·WAVES]"""
    frequency = torch.exp(-math.log(1e4) * torch.arange(WAVES, device=time.device) / WAVES)
    angle = time[:, None].float() * frequency
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.first, self.second = nn.Linear(2 * WAVES, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x.to(self.first.weight.dtype))))


class Clock(Mlp):
    """Time [B] and, in a student, guidance [B] -> [B, dim]"""

    def __init__(self, dim: int, guided: bool):
        super().__init__(dim)
        self.strength = Mlp(dim) if guided else None

    def forward(self, time: Tensor, guidance: Tensor | None = None) -> Tensor:
        embedded = super().forward(waves(time))
        return embedded if guidance is None else embedded + self.strength(waves(guidance))


class Layer(nn.Module):
    """Attention over pictures and texts together.  -> picture tokens [B, N, dim], text tokens [B, T, dim]"""

    def __init__(self, dim: int, heads: int, normed: bool):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=1e-5) if normed else None for _ in range(2))
        self.out, self.told = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, text: Tensor, told: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.cat([x, text], dim=1)
        shift, scale = self.told(told)[:, None].chunk(2, dim=-1)
        y = F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift
        q, k, v = self.query(y), self.key(y), self.value(y)
        if self.norm_q is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        h = h + self.down(F.gelu(self.up(F.layer_norm(h, h.shape[-1:]))))
        return h[:, : x.shape[1]], h[:, x.shape[1] :]


class ToyTransformer(ModelMixin, ConfigMixin):
    """Predicts data − noise, and is told 1 − t_fm."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        channels: int,
        words: int,
        side: int,
        patch: int,
        normed: bool = False,
        guided: bool = False,
        clock_scale: float = 1.0,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        self.stem = nn.Conv2d(channels, dim, patch, patch)
        self.places = nn.Parameter(0.1 * torch.randn((side // patch) ** 2, dim))
        self.reader = nn.Linear(words, dim)
        self.clock = Clock(dim, guided)
        self.layers = nn.ModuleList(Layer(dim, heads, normed) for _ in range(depth))
        self.leaf = nn.Linear(dim, channels * patch**2)

    def forward(
        self, z: Tensor, tau: Tensor, words: Tensor, shown: Tensor, strength: Tensor | None
    ) -> Tensor:
        size, patch = z.shape[2:], self.config.patch
        x = self.stem(z).flatten(2).transpose(1, 2) + self.places
        text, told = self.reader(words), F.silu(self.clock(tau, strength)).to(x.dtype)
        seen = torch.cat([shown.new_ones(x.shape[:2], dtype=torch.bool), shown.bool()], dim=1)
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x, text = self._gradient_checkpointing_func(layer, x, text, told, seen)
            else:
                x, text = layer(x, text, told, seen)
        y = self.leaf(x).transpose(1, 2).unflatten(2, (size[0] // patch, size[1] // patch))
        y = y.unflatten(1, (-1, patch, patch)).permute(0, 1, 4, 2, 5, 3)
        return y.flatten(4, 5).flatten(2, 3)


def velocity(
    network: ToyTransformer,
    x_fm: Tensor,
    t_fm: Tensor,
    text: Tensor,
    mask: Tensor,
    guidance: Tensor | None,
    time_scale: float,
) -> Tensor:
    return -network(x_fm, (1 - t_fm) * time_scale, text, mask, guidance)


def blocks(network: ToyTransformer) -> nn.ModuleList:
    return network.layers


def output_projections(block: Layer) -> list[str]:
    return ["out.weight", "out.bias", "down.weight", "down.bias"]


def tokens(output: tuple[Tensor, Tensor]) -> Tensor:
    return output[0]


@contextmanager
def only_first(network: ToyTransformer, count: int) -> Iterator[None]:
    layers = network.layers
    network.layers = layers[:count]
    try:
        yield
    finally:
        network.layers = layers


def time_embedder(network: ToyTransformer) -> Clock:
    return network.clock


def time_mlp(network: ToyTransformer):
    return _TimeAlone(network.clock), waves


class _TimeAlone(nn.Module):
    """The clock's own two layers."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.first, self.second = clock.first, clock.second

    forward = Mlp.forward


def keep_time_in_float32(network: ToyTransformer) -> None:
    def in_float32(clock: Clock, time: Tensor, guidance: Tensor | None = None) -> Tensor:
        with torch.autocast(time.device.type, enabled=False):
            return Clock.forward(clock, time, guidance)

    network.clock.forward = MethodType(in_float32, network.clock)


def embed_time(network: ToyTransformer, t_fm: Tensor, guidance: Tensor, time_scale: float) -> Tensor:
    return network.clock((1 - t_fm) * time_scale, guidance)


def student_of(adapted: ToyTransformer) -> ToyTransformer:
    student = ToyTransformer.from_config(dict(adapted.config) | {"guided": True})
    nn.init.zeros_(student.clock.strength.second.weight)
    nn.init.zeros_(student.clock.strength.second.bias)
    missing, unexpected = student.load_state_dict(adapted.state_dict(), strict=False)
    assert not unexpected and all(key.startswith("clock.strength.") for key in missing)
    return student.to(torch.float32)


def qk(network: ToyTransformer) -> list[QK]:
    return [
        QK(f"layers.{i}.{name}", f"layers.{i}.norm_{name[0]}.weight", of_text=False)
        for i in range(len(network.layers))
        for name in ("query", "key")
    ]
