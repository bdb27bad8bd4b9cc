"""Fuller captions are true, say more, and leave what is scored alone."""

import hashlib

import numpy as np
import pytest

from sprint.lab.reader import true_of
from sprint.lab.scenes import CATEGORIES, COLORS, RELATIONS, Thing, scene
from tools.make.captions import described, relation_of

N = 600


@pytest.fixture(scope="module")
def fuller():
    rng = np.random.default_rng(0)
    return [described(rng, scene(1000, i)) for i in range(N)]


def test_ordinary_captions_are_as_they_were():
    """Of the series that is scored and of the first that is trained on; taken before fuller captions came."""
    found = [
        hashlib.sha256("\n".join(scene(series, i).caption for i in range(N)).encode()).hexdigest()[:16]
        for series in (2000, 3000)
    ]
    assert found == ["6067a0aaba2d6241", "2074da0f6809b1e7"]


def test_a_fuller_caption_is_true_of_its_scene(fuller):
    for told, plain in zip(fuller, (scene(1000, i) for i in range(N)), strict=True):
        assert told.things == plain.things
        assert told.claim.category == plain.claim.category
        assert true_of(told.things, told.claim), told.caption


def test_its_words_are_its_claim(fuller):
    for told in fuller:
        words = told.caption.split()
        for noun in told.claim.nouns:
            assert (noun.color or noun.shape) in told.caption
        colors = [noun.color for noun in told.claim.nouns if noun.color]
        assert sorted(word for word in words if word in COLORS) == sorted(colors)
        assert [r for r in RELATIONS if r in told.caption] == [r for r in [told.claim.relation] if r]


def test_colour_and_place_are_named_together_in_every_category_of_two(fuller):
    for category in ("two_object", "position", "color_attr"):
        some = [told.claim for told in fuller if told.claim.category == category]
        both = [c for c in some if c.relation and all(noun.color for noun in c.nouns)]
        assert len(some) == N // len(CATEGORIES) and 0.25 < len(both) / len(some) < 0.6


def test_counts_have_colours_too(fuller):
    counts = [told for told in fuller if told.claim.category == "counting"]
    coloured = [told.caption for told in counts if told.claim.nouns[0].color]
    assert 0.6 < len(coloured) / len(counts) < 0.9
    assert any("three red" in caption for caption in coloured)


@pytest.mark.parametrize(
    ("place", "relation"),
    [((10, 30), "left of"), ((50, 40), "right of"), ((30, 10), "above"), ((35, 50), "below")],
)
def test_relations_are_as_seen(place, relation):
    first, second = Thing("circle", "red", *place, 5.0), Thing("cross", "blue", 30.0, 30.0, 5.0)
    assert relation_of(first, second) == relation
