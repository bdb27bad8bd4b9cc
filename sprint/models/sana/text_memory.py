"""A text's keys and values, computed once for all forwards of a frozen network that read the same prompts.

The text does not depend on (x, t). A step of stage 2 shows the frozen teacher one batch of prompts three
times, and a sampler shows the student the same prompts at every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class KeysValues(NamedTuple):
    """What a cross-attention reads of a text: projected and normalised, [B, T, C] each."""

    key: Tensor
    value: Tensor


class SanaTextMemory:
    """Lets `network`, whose weights do not change meanwhile, read each text once.

        memory = SanaTextMemory(network)
        with memory.of(text):
            network(x, text, ...)           # computes keys and values, block by block
            network(y, text[:count], ...)   # reads those of the first `count` rows

    Outside of `of` the network is as it was. Inside, its outputs are too; a text that is not `text` or its
    first rows raises ValueError, and so does a network that is being trained. A backward pass that recomputes
    blocks belongs inside. Works by hooks on modules: weights that are gathered when their block is called are
    there when they are needed.
    """

    def __init__(self, network: SanaTransformer2DModel):
        self.network = network
        for block in network.transformer_blocks:
            block.attn2.set_processor(_GivenKeysValues(block.attn2.processor))

    @contextmanager
    def of(self, text: Tensor, keep: int | None = None) -> Iterator[None]:
        """Inside, the network reads `text` [B, T, D] or its first rows.

        keep   how many rows later calls will read: what is remembered of the others is dropped after use
        """
        reading = _Reading(text, keep or len(text))
        hooks = [self.network.register_forward_pre_hook(reading.before_network, with_kwargs=True)]
        for index, block in enumerate(self.network.transformer_blocks):
            hooks.append(block.register_forward_pre_hook(partial(reading.before_block, index)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Reading:
    """One text's keys and values as far as they are known, and the hooks that use them."""

    def __init__(self, text: Tensor, keep: int):
        self.text, self.version, self.keep = text, _version(text), keep
        self.states: Tensor | None = None  # the text as the blocks get it, after the caption projection
        self.known: dict[int, KeysValues] = {}

    @torch.no_grad()
    def before_network(self, network: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Check the text; once it is remembered, spare the caption projection all but one token."""
        text = kwargs["encoder_hidden_states"]
        rows = len(text)
        same = text.data_ptr() == self.text.data_ptr() and text.shape == self.text[:rows].shape
        if not same or _version(self.text) != self.version:
            raise ValueError("the network was given another text than the one its memory was opened for")
        if network.training and network.proj_out.weight.requires_grad:
            raise ValueError("a text's memory is for networks that are not being trained")
        if self.states is not None and rows <= len(self.states):
            kwargs = kwargs | {"encoder_hidden_states": text[:, :1]}
        return args, kwargs

    @torch.no_grad()
    def before_block(self, index: int, block: nn.Module, args: tuple) -> tuple:
        """Put keys and values where the text's states were."""
        hidden, attention_mask, states, mask, *rest = args
        rows = hidden.shape[0]
        if states.shape[1] == self.text.shape[1] and (self.states is None or rows > len(self.states)):
            self.states = states
        known = self.known.get(index)
        if known is None or len(known.key) < rows:
            known = _keys_and_values(block.attn2, self.states[:rows])
            dropped = rows > self.keep
            self.known[index] = KeysValues(*(x[: self.keep].clone() for x in known)) if dropped else known
        return hidden, attention_mask, KeysValues(*(x[:rows] for x in known)), mask, *rest


def _version(x: Tensor) -> int:
    """Counts the changes of a tensor in place; those made for inference have no count."""
    return 0 if x.is_inference() else x._version


def _keys_and_values(attention: Attention, states: Tensor) -> KeysValues:
    """states [B, T, C]"""
    key = attention.to_k(states)
    return KeysValues(key if attention.norm_k is None else attention.norm_k(key), attention.to_v(states))


class _GivenKeysValues:
    """diffusers' softmax cross-attention where keys and values are given; its own processor otherwise."""

    def __init__(self, ordinary):
        # one is enough for two memories of one network
        self.ordinary = ordinary.ordinary if isinstance(ordinary, _GivenKeysValues) else ordinary

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states=None, attention_mask=None):
        if not isinstance(encoder_hidden_states, KeysValues):
            if attention_mask is not None and attention_mask.shape[-1] != encoder_hidden_states.shape[1]:
                raise RuntimeError("a block was recomputed after its text's memory was closed")
            return self.ordinary(attn, hidden_states, encoder_hidden_states, attention_mask)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query = attn.to_q(hidden_states)
        query = query if attn.norm_q is None else attn.norm_q(query)
        mask = None if attention_mask is None else attention_mask[:, None]  # [B, 1, 1, T]
        out = scaled_dot_product_attention(heads(query), *map(heads, encoder_hidden_states), attn_mask=mask)
        return attn.to_out[0](out.transpose(1, 2).flatten(2).to(query.dtype)) / attn.rescale_output_factor
