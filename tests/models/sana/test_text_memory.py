"""Keys and values of a text, computed once: same outputs, less work, and no way to read the wrong text."""

import pytest
import torch

from sprint.engine.recompute import recompute_in_backward
from sprint.models.sana.text_memory import SanaTextMemory
from sprint.models.taps import TappedTeacher
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from tests.tiny import DEPTH, tiny_batch, tiny_network
from tests.tolerance import assert_close, of_network

TIMES = torch.tensor([0.1, 0.4, 0.9, 1.4])


class Counted:
    """Calls of every text projection of a network, and how many tokens the caption projection saw."""

    def __init__(self, network):
        self.keys = self.values = self.tokens = 0
        for block in network.transformer_blocks:
            block.attn2.to_k.register_forward_hook(self._key)
            block.attn2.to_v.register_forward_hook(self._value)
        network.caption_projection.register_forward_hook(self._caption)

    def _key(self, module, inputs, output):
        self.keys += 1

    def _value(self, module, inputs, output):
        self.values += 1

    def _caption(self, module, inputs, output):
        self.tokens += output.shape[0] * output.shape[1]


def frozen_view(seed: int = 0) -> TrigFlowView:
    return TrigFlowView(tiny_network(seed).eval().requires_grad_(False), DENSE_TIME)


def memory_of(memory: SanaTextMemory):
    """What an open memory holds."""
    (hook,) = memory.network._forward_pre_hooks.values()
    return hook.__self__


def test_the_network_says_the_same_and_reads_each_text_once():
    plain, view = frozen_view(), frozen_view()
    memory, count = SanaTextMemory(view.network), Counted(view.network)
    x, text, mask = tiny_batch(4)
    with memory.of(text):
        for rows in (4, 4, 2, 3):
            ours = view(x[:rows], TIMES[:rows], text[:rows], mask[:rows])
            assert_close(ours, plain(x[:rows], TIMES[:rows], text[:rows], mask[:rows]), of_network(view))
    assert (count.keys, count.values) == (DEPTH, DEPTH)
    assert count.tokens == 4 * text.shape[1] + 4 + 2 + 3  # later only one token, and nobody reads it


def test_rows_beyond_keep_are_used_once():
    view = frozen_view()
    memory = SanaTextMemory(view.network)
    x, text, mask = tiny_batch(4)
    expected = frozen_view()(x, TIMES, text, mask)
    with memory.of(text, keep=2):
        assert torch.equal(view(x, TIMES, text, mask), expected)
        kept = memory_of(memory).known
        assert len(kept) == DEPTH and all(len(known.key) == 2 for known in kept.values())
        assert_close(view(x[:2], TIMES[:2], text[:2], mask[:2]), expected[:2], of_network(view))
        assert torch.equal(view(x, TIMES, text, mask), expected)  # computed anew
    assert not view.network._forward_pre_hooks


def test_a_longer_call_after_a_shorter_one():
    view, plain = frozen_view(), frozen_view()
    x, text, mask = tiny_batch(4)
    with SanaTextMemory(view.network).of(text):
        view(x[:1], TIMES[:1], text[:1], mask[:1])
        assert_close(view(x, TIMES, text, mask), plain(x, TIMES, text, mask), of_network(view))


def test_outside_it_every_call_reads_its_own_text():
    view, plain = frozen_view(), frozen_view()
    SanaTextMemory(view.network)
    for seed in (0, 1):
        x, text, mask = tiny_batch(4, seed)
        assert torch.equal(view(x, TIMES, text, mask), plain(x, TIMES, text, mask))


def test_a_tapped_teacher_reads_the_text_for_its_own_blocks_alone():
    view, (x, text, mask) = frozen_view(), tiny_batch(4)
    tapped, count = TappedTeacher(view, (0,)), Counted(view.network)
    (expected,) = TappedTeacher(frozen_view(), (0,))(x, TIMES, text, mask)
    with SanaTextMemory(view.network).of(text):
        for _ in range(2):
            (features,) = tapped(x, TIMES, text, mask)
            assert torch.equal(features, expected)
        assert (count.keys, count.values) == (1, 1)
        view(x, TIMES, text, mask)  # as the guided velocity: all blocks, the first from memory
    assert (count.keys, count.values) == (DEPTH, DEPTH)


def test_another_text_is_refused():
    view = frozen_view()
    x, text, mask = tiny_batch(4)
    with SanaTextMemory(view.network).of(text), pytest.raises(ValueError, match="another text"):
        view(x, TIMES, text.clone(), mask)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_to_the_picture_are_the_same(checkpointing):
    gradients = []
    for remembered in (False, True):
        view = frozen_view()
        if checkpointing:
            view.network.enable_gradient_checkpointing(gradient_checkpointing_func=recompute_in_backward)
        x, text, mask = tiny_batch(4)
        x.requires_grad_()
        if remembered:
            with SanaTextMemory(view.network).of(text):
                view(x.detach(), TIMES, text, mask)
                view(x, TIMES, text, mask).square().sum().backward()
        else:
            view(x, TIMES, text, mask).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_a_recomputation_after_the_memory_is_closed_raises():
    view = frozen_view()
    view.network.enable_gradient_checkpointing(gradient_checkpointing_func=recompute_in_backward)
    x, text, mask = tiny_batch(4)
    x.requires_grad_()
    with SanaTextMemory(view.network).of(text):
        view(x.detach(), TIMES, text, mask)
        loss = view(x, TIMES, text, mask).square().sum()
    with pytest.raises(RuntimeError, match="memory was closed"):
        loss.backward()


@torch.no_grad()
def test_two_memories_of_one_network_do_not_meet():
    view, plain = frozen_view(), frozen_view()
    first, second = SanaTextMemory(view.network), SanaTextMemory(view.network)
    x, text, mask = tiny_batch(4)
    for memory in (first, second, first):
        with memory.of(text):
            for _ in range(2):
                assert torch.equal(view(x, TIMES, text, mask), plain(x, TIMES, text, mask))


def test_a_text_changed_in_place_or_cut_is_refused():
    view = frozen_view()
    x, text, mask = tiny_batch(4)
    with SanaTextMemory(view.network).of(text):
        with pytest.raises(ValueError, match="another text"):
            view(x, TIMES, text[:, :3], mask[:, :3])
        view(x, TIMES, text, mask)
        text.mul_(2)
        with pytest.raises(ValueError, match="another text"):
            view(x, TIMES, text, mask)


def test_a_network_in_training_is_refused():
    view = TrigFlowView(tiny_network().train(), DENSE_TIME)
    x, text, mask = tiny_batch(4)
    with SanaTextMemory(view.network).of(text), pytest.raises(ValueError, match="not being trained"):
        view(x, TIMES, text, mask)
