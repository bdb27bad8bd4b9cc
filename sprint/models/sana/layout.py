"""Sana's network with its channels last from the first layer to the last. Same weights, names and hooks.

diffusers' blocks hand tokens [B, N, C] on, but attention and the mixed feed-forward turn them to [B, C, N] and
[B, C, H, W] and back. Here 1×1 convolutions are matrix products over tokens, the depthwise convolution is one
operator, and linear attention multiplies head by head. Every module is still called, so that what hangs on calls
(gathering of weights, recording of features) is there; diffusers' own forwards remain the oracle.
"""

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import Tensor, nn
from torch.nn.functional import silu

from sprint.base.depthwise import depthwise
from sprint.base.products import Product

EPS = 1e-15  # of linear attention's sum, as diffusers has it
HALF = 65504.0  # the largest number of float16, to which diffusers cuts what attention gives


def lay_channels_last(network: SanaTransformer2DModel) -> None:
    """From the next call on; once more changes nothing. Parts that are not as Sana has them stay as they are."""
    patches = network.patch_embed.proj
    if _is_pointwise(patches):
        patches.forward = PointwiseOnPicture(patches)
    for block in network.transformer_blocks:
        if isinstance(block.attn1.processor, SanaLinearAttnProcessor2_0):
            block.attn1.set_processor(LinearAttention())
        mixed = block.ff
        if type(mixed) is GLUMBConv and mixed.norm is None and not mixed.residual_connection:
            mixed.conv_inverted.forward = Product(mixed.conv_inverted)
            mixed.conv_depth.forward = Depthwise(mixed.conv_depth)
            mixed.conv_point.forward = Product(mixed.conv_point)
            mixed.forward = MixedFeedForward(mixed)


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == layer.stride == (1, 1)


class PointwiseOnPicture(Product):
    """A 1×1 convolution of a picture [B, C, H, W] whose result lies channels last."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Depthwise:
    """A depthwise convolution's forward on [B, H, W, C]."""

    def __init__(self, layer: nn.Conv2d):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return depthwise(x, self.layer.weight, self.layer.bias)


class MixedFeedForward:
    """`GLUMBConv`'s forward: expand, mix neighbours, gate, contract.  [B, C, H, W] -> [B, C, H, W], channels last"""

    def __init__(self, layer: GLUMBConv):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        mixed = layer.conv_depth(silu(layer.conv_inverted(x.permute(0, 2, 3, 1))))
        value, gate = mixed.chunk(2, dim=-1)
        return layer.conv_point(value * silu(gate)).permute(0, 3, 1, 2)


class LinearAttention:
    """ReLU linear attention (Sana, arXiv 2410.10629, §2.2): q (kᵀ v) / (q · Σ k), head by head in float32."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None
    ):
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2).float()

        query, key = attn.to_q(hidden_states), attn.to_k(hidden_states)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        q, k, v = heads(query.relu()), heads(key.relu()), heads(attn.to_v(hidden_states))
        total = (q * k.sum(2, keepdim=True)).sum(3, keepdim=True) + EPS
        out = (q @ (k.transpose(2, 3) @ v)) / total
        out = attn.to_out[0](out.transpose(1, 2).flatten(2).to(hidden_states.dtype))
        return out.clip(-HALF, HALF) if out.dtype is torch.float16 else out
