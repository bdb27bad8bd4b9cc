"""The LADD discriminator: one small convolutional head per tapped block of the frozen teacher.

Sources: SANA-Sprint (arXiv 2503.09641, §3.3); the heads of StyleGAN-T (arXiv 2301.09515).
Axes: B samples, N tokens, C channels, G virtual groups.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

VIRTUAL_BATCH = 8
SLOPE = 0.2


class BatchNormLocal(nn.Module):
    """Batch norm over virtual groups of at most `virtual_batch` samples; no running statistics.

    A batch of B falls into G = ⌈B/virtual_batch⌉ runs of neighbours whose sizes differ by at most one, so
    no sample is ever normalised by itself alone unless B = 1. The sample's place in the batch decides its
    group, nothing else. Mean and variance are over the group's samples and tokens, in float32 or wider;
    training and evaluation are the same function.

    What is common to a group is subtracted. A group of fakes alone therefore hides that they are fake:
    give every group both kinds, in both phases, by `interleave`.
    """

    def __init__(self, channels: int, virtual_batch: int = VIRTUAL_BATCH, eps: float = 1e-5):
        super().__init__()
        self.virtual_batch = virtual_batch
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCN: Tensor) -> Tensor:
        groups = math.ceil(len(x_BCN) / self.virtual_batch)
        x = x_BCN.to(torch.promote_types(x_BCN.dtype, torch.float32))
        x = torch.cat([self._normalise(group) for group in x.tensor_split(groups)])
        return (x * self.weight[:, None] + self.bias[:, None]).to(x_BCN.dtype)

    def _normalise(self, x_BCN: Tensor) -> Tensor:
        var, mean = torch.var_mean(x_BCN, dim=(0, 2), correction=0, keepdim=True)
        return (x_BCN - mean) * torch.rsqrt(var + self.eps)


class ConvNormAct(nn.Sequential):
    """Spectrally normalised circular convolution over tokens, local batch norm, leaky ReLU.  [B, C, N]"""

    def __init__(self, channels: int, kernel_size: int, virtual_batch: int):
        padding = kernel_size // 2
        conv = nn.Conv1d(channels, channels, kernel_size, padding=padding, padding_mode="circular")
        super().__init__(spectral_norm(conv), BatchNormLocal(channels, virtual_batch), nn.LeakyReLU(SLOPE))


class DiscriminatorHead(nn.Module):
    """[B, N, C] -> [B, N] logits. Tokens form a ring: N must be at least 4, half the wide kernel."""

    def __init__(self, width: int, virtual_batch: int = VIRTUAL_BATCH):
        super().__init__()
        self.pointwise = ConvNormAct(width, 1, virtual_batch)
        self.residual = ConvNormAct(width, 9, virtual_batch)
        self.logit = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, x_BNC: Tensor) -> Tensor:
        x = self.pointwise(x_BNC.transpose(1, 2))
        x = (self.residual(x) + x) / math.sqrt(2)
        return self.logit(x).squeeze(1)


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
