"""Captions: one, or several drawn by clip score; whatever else a file may hold."""

import numpy as np
import pytest

from sprint.data.captions import LONGEST, caption_from, choose_caption
from sprint.data.items import BadSample
from tests.tolerance import near, sampling

DRAWS = sampling(0.5, 5000)  # of a share, at its widest


def frequencies(captions, scores, temperature, draws=5000):
    draw = np.random.default_rng(0)
    drawn = [choose_caption(captions, scores, temperature, draw) for _ in range(draws)]
    return [drawn.count(caption) / draws for caption in captions]


def test_captions_are_drawn_with_weight_exp_score_over_temperature():
    weights = np.exp(np.array([0.31, 0.28, 0.1]) / 0.1)
    expected = weights / weights.sum()  # 0.54, 0.40, 0.07
    assert frequencies("abc", [0.31, 0.28, 0.1], 0.1) == near(expected, DRAWS, scale=1)
    assert frequencies("abc", [0.31, 0.28, 0.1], 1e9) == near([1 / 3] * 3, DRAWS, scale=1)
    assert frequencies("abc", None, 0.1) == near([1 / 3] * 3, DRAWS, scale=1)


def test_extreme_scores_neither_overflow_nor_vanish():
    assert frequencies("ab", [1e6, 1e6], 1e-3, 200)[0] == near(0.5, sampling(0.5, 200), scale=1)
    assert frequencies("ab", [-1e6, -1e6 + 1], 1e-3, 50) == [0, 1]


def take(value, temperature=0.1, seed=0):
    return caption_from(value, "here", temperature, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        (" one\n", "one"),
        (["one"], "one"),
        (["one", " ", ""], "one"),
        ({"prompt": "one", "height": 3}, "one"),
        ({"captions": ["one", "two"], "clip_scores": [9, -9]}, "one"),
        (
            {"captions": ["one", "", "two"], "clip_scores": [9, 90, -9.0]},
            "one",
        ),  # the blank one is never drawn
    ],
)
def test_what_a_caption_may_be(value, caption):
    assert {take(value, seed=seed) for seed in range(5)} == {caption}


def test_several_captions_are_all_drawn():
    assert {take(["a", "b"], seed=seed) for seed in range(20)} == {"a", "b"}
    assert {take({"captions": ["a", "b"]}, seed=seed) for seed in range(20)} == {"a", "b"}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "missing caption"),
        ({}, "missing caption"),
        ({"prompt": None}, "missing caption"),
        (" \n", "empty caption"),
        ([], "empty caption"),
        (["", " "], "empty caption"),
        (3, "unreadable caption"),
        (["a", None], "unreadable caption"),
        ({"captions": {"a": 1}}, "unreadable caption"),
        ({"captions": ["a", "b"], "clip_scores": [1]}, "unreadable caption"),
        ({"captions": ["a", "b"], "clip_scores": [1, "2"]}, "unreadable caption"),
        ({"captions": ["a", "b"], "clip_scores": [1, float("nan")]}, "unreadable caption"),
        ({"captions": ["a", "b"], "clip_scores": [1, 10**400]}, "unreadable caption"),
        ("half a pair \ud800", "unreadable caption"),
        (["a", "\udfff"], "unreadable caption"),  # whichever is drawn
        ("a" * (LONGEST + 1), "unreadable caption"),
    ],
)
def test_no_caption_to_be_had(value, reason):
    with pytest.raises(BadSample, match=r"^here: ") as caught:
        take(value)
    assert caught.value.reason == reason and "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_long_caption_is_one():
    assert len(take(" " + "é" * LONGEST)) == LONGEST and take("\U0001f600") == "\U0001f600"
