"""The LADD discriminator: one small convolutional head per tapped block of the frozen teacher.

Sources: SANA-Sprint (arXiv 2503.09641, §3.3); the heads of StyleGAN-T (arXiv 2301.09515).
Axes: B samples, N tokens, C channels, R = N + 8 tokens of a ring with its ends repeated.
"""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from sprint.base.errors import SprintError
from sprint.recipe.schema import NormGroups

SLOPE = 0.2
REACH = 4  # tokens that the wide convolution sees on either side


class BatchNormLocal(nn.Module):
    """Batch norm over groups of `virtual_batch` neighbours; no running statistics.  [B, N, C]

    Sample i is of group i // virtual_batch, whatever else is in the batch: a batch in parts, or over several
    processes, gives what the whole gives if every cut is between groups. The last group may be smaller. Mean
    and variance are over the group's samples and tokens, computed in float32 or wider; training and
    evaluation are the same function.

    What is common to a group is subtracted. A group of fakes alone therefore hides that they are fake:
    give every group both kinds, in both phases, by `interleave`.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BNC: Tensor, virtual_batch: int) -> Tensor:
        wide = torch.promote_types(x_BNC.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        groups = [
            F.batch_norm(group.flatten(0, 1), None, None, weight, bias, training=True, eps=self.eps)
            for group in x_BNC.split(virtual_batch)
        ]
        return torch.cat(groups).view(x_BNC.shape)


class TokenConv(nn.Conv1d):
    """Convolution over tokens that stay where they are in memory.  [B, N, C] -> [B, N − kernel_size + 1, C']

    The tokens become the width of a channels-last picture one pixel high; conv1d would copy them to [B, C, N].
    """

    def forward(self, x_BNC: Tensor) -> Tensor:
        y_BC1N = F.conv2d(x_BNC.transpose(1, 2).unsqueeze(2), self.weight.unsqueeze(2), self.bias)
        return y_BC1N.squeeze(2).transpose(1, 2)


class ConvNorm(nn.ModuleList):
    """Spectrally normalised convolution over tokens, local batch norm. `DiscriminatorHead` activates."""

    def __init__(self, channels: int, kernel_size: int):
        conv = TokenConv(channels, channels, kernel_size)
        super().__init__([spectral_norm(conv), BatchNormLocal(channels)])

    def forward(self, x_BNC: Tensor, virtual_batch: int) -> Tensor:
        conv, norm = self
        return norm(conv(x_BNC), virtual_batch)


class Logit(nn.Conv1d):
    """w·(x + y)/√2 + bias as w·x + w·y, so that the sum is never stored.  ring of x, y [B, N, C] -> [B, N]"""

    def __init__(self, channels: int):
        super().__init__(channels, 1, 1)

    def forward(self, ring_BRC: Tensor, y_BNC: Tensor) -> Tensor:
        weight = self.weight.flatten() / math.sqrt(2)
        return (ring_BRC @ weight)[:, REACH:-REACH] + y_BNC @ weight + self.bias


class DiscriminatorHead(nn.Module):
    """[B, N, C] -> [B, N] logits. Tokens form a ring.  Raises SprintError for N < 4, half the wide kernel.

    x = act(norm(conv_1(features))), y = act(norm(conv_9(x))), logit of (x + y)/√2. x exists only with its ends
    repeated, as the ring that conv_9 reads, and both activations overwrite: the backward keeps five tensors
    the size of the features.
    """

    def __init__(self, width: int):
        super().__init__()
        self.pointwise = ConvNorm(width, 1)
        self.residual = ConvNorm(width, 2 * REACH + 1)
        self.logit = spectral_norm(Logit(width))

    def forward(self, x_BNC: Tensor, virtual_batch: int) -> Tensor:
        ring_BRC = F.leaky_relu(on_ring(self.pointwise(x_BNC, virtual_batch)), SLOPE, inplace=True)
        y_BNC = F.leaky_relu(self.residual(ring_BRC, virtual_batch), SLOPE, inplace=True)
        return self.logit(ring_BRC, y_BNC)


def on_ring(x_BNC: Tensor) -> Tensor:
    """The last `REACH` tokens again in front, the first again behind.  [B, N, C] -> [B, N + 2·REACH, C]"""
    if x_BNC.shape[1] < REACH:
        raise SprintError(f"the discriminator needs at least {REACH} tokens a picture, not {x_BNC.shape[1]}")
    return torch.cat([x_BNC[:, -REACH:], x_BNC, x_BNC[:, :REACH]], dim=1)


class DiscriminatorHeads(nn.Module):
    """One head per tapped block.

    width   channels of the tapped features (1152 for 0.6B, 2240 for 1.6B)
    count   number of tapped blocks

    Every forward in training mode advances the power iteration of the spectral norms, whose vectors are
    buffers: `state_dict` has them, and a checkpoint must. The generator's phase uses the heads `frozen`.
    """

    def __init__(self, width: int, count: int):
        super().__init__()
        self.heads = nn.ModuleList(DiscriminatorHead(width) for _ in range(count))

    def forward(self, features: Sequence[Tensor], virtual_batch: int) -> Tensor:
        """features: one [B, N, C] per head, in order; batch-norm statistics over `virtual_batch` neighbours.

        -> logits [B, count · N]
        """
        logits = [head(x_BNC, virtual_batch) for head, x_BNC in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1)

    @contextmanager
    def frozen(self) -> Iterator["DiscriminatorHeads"]:
        """Inside, a forward changes no state and its graph reaches the features but not the heads' weights.

        The backward may come after the context. The previous mode and flags return at the end.
        """
        training = self.training
        flags = [(p, p.requires_grad) for p in self.parameters()]
        self.eval().requires_grad_(False)
        try:
            yield self
        finally:
            self.train(training)
            for p, requires_grad in flags:
                p.requires_grad_(requires_grad)


def interleave(*batches: Tensor) -> Tensor:
    """K batches [B, ...] of equal size -> [K·B, ...]: a0, b0, a1, b1, ...

    With K kinds of sample (real, fake, misaligned) and a virtual batch of a multiple of K, every group has as
    many of each kind. The logits of the whole come apart again by `deinterleave`.
    """
    return torch.stack(batches, dim=1).flatten(0, 1)


def deinterleave(batch: Tensor, kinds: int) -> tuple[Tensor, ...]:
    """[K·B, ...] -> K views [B, ...]: the inverse of `interleave`."""
    return batch.unflatten(0, (-1, kinds)).unbind(dim=1)


def one_after_another(*batches: Tensor) -> Tensor:
    """K batches [B, ...] of equal size -> [K·B, ...]: all of a, all of b, ... `parted` takes them apart again."""
    return torch.cat(batches)


def parted(batch: Tensor, kinds: int) -> tuple[Tensor, ...]:
    """[K·B, ...] -> K views [B, ...]: the inverse of `one_after_another`."""
    return batch.chunk(kinds)


class Arrangement(NamedTuple):
    """How kinds of samples lie in the batch that the heads see, and so which of them share batch-norm statistics.

    join    K batches [B, ...] -> [K·B, ...];  part: back again, given K
    group   samples in a group, given `neighbours` and K
    """

    join: Callable[..., Tensor]
    part: Callable[[Tensor, int], tuple[Tensor, ...]]
    group: Callable[[int, int], int]


ARRANGEMENTS = {
    NormGroups.mixed: Arrangement(interleave, deinterleave, operator.mul),
    NormGroups.separate: Arrangement(one_after_another, parted, lambda neighbours, kinds: neighbours),
}


def swapped(x: Tensor, neighbours: int) -> Tensor:
    """Every sample's place taken by the one before it, round and round in groups of `neighbours`."""
    return torch.cat([group.roll(1, dims=0) for group in x.split(neighbours)])
