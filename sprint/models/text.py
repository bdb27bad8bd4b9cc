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


class TextMemory:
    """Lets `network`, whose weights do not change meanwhile, read each text once.

        memory = TextMemory(network)
        with memory.of(text):
            network(x, text, ...)           # computes keys and values, block by block
            network(y, text[:count], ...)   # reads those of the first `count` rows

    Outside of `of` the network is as it was. Inside, its outputs are too; a text that is not `text` or its
    first rows raises ValueError. A backward pass that recomputes blocks belongs inside. Works by hooks on
    modules: weights that are gathered when their block is called are there when they are needed.
    """

    def __init__(self, network: SanaTransformer2DModel):
        self._text: Tensor | None = None
        self._hooks = [network.register_forward_pre_hook(self._before_network, with_kwargs=True)]
        for index, block in enumerate(network.transformer_blocks):
            block.attn2.set_processor(_GivenKeysValues(block.attn2.processor))
            self._hooks.append(block.register_forward_pre_hook(partial(self._before_block, index)))

    def remove(self) -> None:
        """Take the hooks off: from now on every call reads its own text."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def of(self, text: Tensor, keep: int | None = None) -> Iterator[None]:
        """Inside, the network reads `text` [B, T, D] or its first rows.

        keep   how many rows later calls will read: what is remembered of the others is dropped after use
        """
        self._text, self._keep = text, keep or len(text)
        self._states: Tensor | None = None  # the text as the blocks get it, after the caption projection
        self._memory: dict[int, KeysValues] = {}
        try:
            yield
        finally:
            self._text = self._states = None
            self._memory = {}

    @torch.no_grad()
    def _before_network(self, network: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Check the text; once it is remembered, spare the caption projection all but one token."""
        if self._text is None:
            return None
        text = kwargs["encoder_hidden_states"]
        if text.data_ptr() != self._text.data_ptr() or len(text) > len(self._text):
            raise ValueError("the network was given another text than the one its memory was opened for")
        if self._states is not None and len(text) <= len(self._states):
            kwargs = kwargs | {"encoder_hidden_states": text[:, :1]}
        return args, kwargs

    @torch.no_grad()
    def _before_block(self, index: int, block: nn.Module, args: tuple) -> tuple | None:
        """Put keys and values where the text's states were."""
        hidden, attention_mask, states, mask, *rest = args
        whole = mask is None or states.shape[1] == mask.shape[-1]
        if self._text is None:
            if not whole:
                raise RuntimeError("a block was recomputed after its text's memory was closed")
            return None
        rows = hidden.shape[0]
        if whole and (self._states is None or rows > len(self._states)):
            self._states = states
        known = self._memory.get(index)
        if known is None or len(known.key) < rows:
            known = _keys_and_values(block.attn2, self._states[:rows])
            dropped = rows > self._keep
            self._memory[index] = KeysValues(*(x[: self._keep].clone() for x in known)) if dropped else known
        return hidden, attention_mask, KeysValues(*(x[:rows] for x in known)), mask, *rest


def _keys_and_values(attention: Attention, states: Tensor) -> KeysValues:
    """states [B, T, C]"""
    key = attention.to_k(states)
    return KeysValues(key if attention.norm_k is None else attention.norm_k(key), attention.to_v(states))


class _GivenKeysValues:
    """diffusers' softmax cross-attention where keys and values are given; its own processor otherwise."""

    def __init__(self, ordinary):
        self.ordinary = ordinary

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states=None, attention_mask=None):
        if not isinstance(encoder_hidden_states, KeysValues):
            return self.ordinary(attn, hidden_states, encoder_hidden_states, attention_mask)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query = attn.to_q(hidden_states)
        query = query if attn.norm_q is None else attn.norm_q(query)
        mask = None if attention_mask is None else attention_mask[:, None]  # [B, 1, 1, T]
        out = scaled_dot_product_attention(heads(query), *map(heads, encoder_hidden_states), attn_mask=mask)
        return attn.to_out[0](out.transpose(1, 2).flatten(2).to(query.dtype)) / attn.rescale_output_factor
