"""The LADD discriminator: one small convolutional head per tapped block of the frozen teacher.

Sources: SANA-Sprint (arXiv 2503.09641, §3.3); the heads of StyleGAN-T (arXiv 2301.09515).
Axes: B samples, N tokens, C channels, G virtual groups, R = N + 8 tokens of a ring with its ends repeated.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from sprint.errors import SprintError

VIRTUAL_BATCH = 8
SLOPE = 0.2
REACH = 4  # tokens that the wide convolution sees on either side


class BatchNormLocal(nn.Module):
    """Batch norm over virtual groups of at most `virtual_batch` samples; no running statistics.  [B, N, C]

    A batch of B falls into G = ⌈B/virtual_batch⌉ runs of neighbours whose sizes differ by at most one, so
    no sample is ever normalised by itself alone unless B = 1. The sample's place in the batch decides its
    group, nothing else. Mean and variance are over the group's samples and tokens, computed in float32 or
    wider; training and evaluation are the same function.

    What is common to a group is subtracted. A group of fakes alone therefore hides that they are fake:
    give every group both kinds, in both phases, by `interleave`.
    """

    def __init__(self, channels: int, virtual_batch: int = VIRTUAL_BATCH, eps: float = 1e-5):
        super().__init__()
        self.virtual_batch = virtual_batch
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BNC: Tensor) -> Tensor:
        wide = torch.promote_types(x_BNC.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        groups = [
            F.batch_norm(group.flatten(0, 1), None, None, weight, bias, training=True, eps=self.eps)
            for group in x_BNC.split(self._sizes(len(x_BNC)))
        ]
        return torch.cat(groups).view(x_BNC.shape)

    def _sizes(self, batch: int) -> list[int]:
        groups = math.ceil(batch / self.virtual_batch)
        size, larger = divmod(batch, groups)
        return [size + 1] * larger + [size] * (groups - larger)


class TokenConv(nn.Conv1d):
    """Convolution over tokens that stay where they are in memory.  [B, N, C] -> [B, N − kernel_size + 1, C']

    The tokens become the width of a channels-last picture one pixel high; conv1d would copy them to [B, C, N].
    """

    def forward(self, x_BNC: Tensor) -> Tensor:
        y_BC1N = F.conv2d(x_BNC.transpose(1, 2).unsqueeze(2), self.weight.unsqueeze(2), self.bias)
        return y_BC1N.squeeze(2).transpose(1, 2)


class ConvNorm(nn.Sequential):
    """Spectrally normalised convolution over tokens, local batch norm. `DiscriminatorHead` activates."""

    def __init__(self, channels: int, kernel_size: int, virtual_batch: int):
        conv = TokenConv(channels, channels, kernel_size)
        super().__init__(spectral_norm(conv), BatchNormLocal(channels, virtual_batch))


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

    def __init__(self, width: int, virtual_batch: int = VIRTUAL_BATCH):
        super().__init__()
        self.pointwise = ConvNorm(width, 1, virtual_batch)
        self.residual = ConvNorm(width, 2 * REACH + 1, virtual_batch)
        self.logit = spectral_norm(Logit(width))

    def forward(self, x_BNC: Tensor) -> Tensor:
        ring_BRC = F.leaky_relu(on_ring(self.pointwise(x_BNC)), SLOPE, inplace=True)
        y_BNC = F.leaky_relu(self.residual(ring_BRC), SLOPE, inplace=True)
        return self.logit(ring_BRC, y_BNC)


def on_ring(x_BNC: Tensor) -> Tensor:
    """The last `REACH` tokens again in front, the first again behind.  [B, N, C] -> [B, N + 2·REACH, C]"""
    if x_BNC.shape[1] < REACH:
        raise SprintError(f"the discriminator needs at least {REACH} tokens a picture, not {x_BNC.shape[1]}")
    return torch.cat([x_BNC[:, -REACH:], x_BNC, x_BNC[:, :REACH]], dim=1)


class DiscriminatorHeads(nn.Module):
    """One head per tapped block.

    width           channels of the tapped features (1152 for 0.6B, 2240 for 1.6B)
    count           number of tapped blocks
    virtual_batch   samples that share batch-norm statistics

    Every forward in training mode advances the power iteration of the spectral norms, whose vectors are
    buffers: `state_dict` has them, and a checkpoint must. The generator's phase uses the heads `frozen`.
    """

    def __init__(self, width: int, count: int, virtual_batch: int = VIRTUAL_BATCH):
        super().__init__()
        self.heads = nn.ModuleList(DiscriminatorHead(width, virtual_batch) for _ in range(count))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """features: one [B, N, C] per head, in order.  -> logits [B, count · N]"""
        logits = [head(x_BNC) for head, x_BNC in zip(self.heads, features, strict=True)]
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

    With K kinds of sample (real, fake, misaligned) and a virtual batch of at least K, every virtual group
    has all kinds, whatever B. The logits of the whole come apart again by `deinterleave`.
    """
    return torch.stack(batches, dim=1).flatten(0, 1)


def deinterleave(batch: Tensor, kinds: int) -> tuple[Tensor, ...]:
    """[K·B, ...] -> K views [B, ...]: the inverse of `interleave`."""
    return batch.unflatten(0, (-1, kinds)).unbind(dim=1)
