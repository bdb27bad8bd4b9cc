"""The scenes are what their captions say, and the reader can tell."""

import hashlib
from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from sprint.base.errors import SprintError
from sprint.lab.reader import (
    check,
    holds,
    read,
    score,
    true_of,
)
from sprint.lab.scenes import (
    BACKGROUND,
    CATEGORIES,
    COLORS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SIZE,
    Claim,
    Noun,
    Thing,
    render,
    scene,
)

N = 600


@cache
def real():
    scenes = [scene(seed=7, index=i) for i in range(N)]
    return scenes, [render(s.things) for s in scenes]


@cache
def seen():
    return [read(picture) for picture in real()[1]]


def thing(shape="circle", color="red", x=20.0, y=32.0, radius=11.5):
    return Thing(shape, color, x, y, radius)


def single(shape, size=None, category="single_object", color=None):
    return Claim(category, (Noun(shape, color=color, size=size),))


def to_uint8(picture):
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def blurred(picture, sigma):
    return to_uint8(ndimage.gaussian_filter(picture.astype(float), (sigma, sigma, 0)))


# ---- scenes ---------------------------------------------------------------------------------------------


def test_a_scene_depends_on_seed_and_index_alone():
    pixels = b"".join(render(scene(0, i).things).tobytes() for i in range(24))
    assert hashlib.sha256(pixels).hexdigest()[:16] == "fbb80e8e78e098b1"
    assert scene(0, 5) == scene(0, 5)
    assert scene(0, 5) != scene(1, 5)
    assert scene(0, 5) != scene(0, 11)  # same category


def test_categories_take_turns():
    scenes, _ = real()
    assert [s.claim.category for s in scenes[:6]] == list(CATEGORIES)
    assert {c: sum(s.claim.category == c for s in scenes) for c in CATEGORIES} == dict.fromkeys(
        CATEGORIES, 100
    )
    assert scene(0, 0, category="counting").claim.category == "counting"


def test_objects_never_overlap_nor_leave_the_canvas():
    for s in real()[0]:
        black = [Thing(t.shape, "black", t.x, t.y, t.radius) for t in s.things]
        inside = sum((render((t,))[..., 0] < 134).astype(int) for t in black)  # half covered or more
        assert inside.max() == 1, s.caption
        for t in s.things:
            assert t.radius + 1 <= min(t.x, t.y)
            assert max(t.x, t.y) <= SIZE - t.radius - 1


def test_the_caption_says_what_the_things_show():
    for s in real()[0]:
        nouns, words = s.claim.nouns, f" {s.caption} "
        assert true_of(s.things, s.claim), s.caption
        for noun in nouns:
            named = [w for w in (noun.size, noun.color, noun.shape) if w]
            assert " ".join(named) in words
        assert [c for c in COLORS if f" {c} " in words] == [
            c for c in COLORS if c in {n.color for n in nouns}
        ]
        relation = [r for r in RELATIONS if f" {r} " in words]
        assert relation == ([s.claim.relation] if s.claim.relation else [])
        if s.claim.category == "counting":
            assert f"{NUMBERS[len(s.things)]} {s.things[0].shape}" in words


def test_captions_vary():
    counting = {scene(1, i, "counting").caption.split()[0] for i in range(60)}
    assert counting == {"a", "there", "two", "three"}
    assert len({scene(1, i).caption for i in range(300)}) > 200


# ---- reader on real scenes ------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_scenes_hold():
    scenes, pictures = real()
    result = score(pictures, [s.claim for s in scenes])
    assert result["mean_over_samples"] >= 0.995
    assert result["n"] == N
    assert all(c["share"] >= 0.98 and c["n"] == 100 for c in result["categories"].values())


@pytest.mark.slow
def test_objects_are_measured():
    for s, objects in zip(real()[0], seen(), strict=True):
        objects = sorted(objects, key=lambda o: (o.x, o.y))
        things = sorted(s.things, key=lambda t: (t.x, t.y))
        assert [(o.shape, o.color) for o in objects] == [(t.shape, t.color) for t in things]
        error = [
            abs(np.array([o.x - t.x, o.y - t.y, o.radius - t.radius]))
            for o, t in zip(objects, things, strict=True)
        ]
        assert np.max(error) < 0.5  # pixels


def test_shuffled_captions_hold_as_often_as_the_objects_make_them():
    """Claims dealt again within each category: the reader agrees with the objects, picture by picture."""
    scenes, _ = real()
    rng = np.random.default_rng(0)
    read_shares, agreements = {}, []
    for category in CATEGORIES:
        mine = [i for i, s in enumerate(scenes) if s.claim.category == category]
        dealt = [scenes[i].claim for i in rng.permutation(mine)]
        verdicts = [check(seen()[i], claim) for i, claim in zip(mine, dealt, strict=True)]
        truths = [true_of(scenes[i].things, claim) for i, claim in zip(mine, dealt, strict=True)]
        agreements += [v == t for v, t in zip(verdicts, truths, strict=True)]
        read_shares[category] = np.mean(verdicts)
    assert np.mean(agreements) >= 0.995
    # Chance, from the generator: a shape is 1 of 4, its size is told half the time (so 3 in 4 pass), a
    # colour is 1 of 6, a pair of shapes 1 of 6, one of two counts; 100 samples each, three deviations.
    chance = {
        "single_object": 1 / 4 * 3 / 4,
        "two_object": 1 / 6,
        "counting": 1 / 4 * 1 / 2,
        "colors": 1 / 4 * 3 / 4 * 1 / 6,
        "position": 1 / 6 * 1 / 4,
        "color_attr": 1 / 6 * 1 / 30,
    }
    for category, p in chance.items():
        assert abs(read_shares[category] - p) <= 3 * np.sqrt(p * (1 - p) / 100), category


def noisy(picture):
    return to_uint8(picture + np.random.default_rng(0).normal(0, 6, picture.shape))


def halved(picture):
    small = picture.reshape(32, 2, 32, 2, 3).mean((1, 3))
    return to_uint8(ndimage.zoom(small, (2, 2, 1), order=1, grid_mode=True, mode="nearest"))


@pytest.mark.parametrize("soften", [noisy, lambda p: blurred(p, 0.8), halved], ids=["noise", "blur", "half"])
def test_slight_damage_is_forgiven(soften):
    scenes, pictures = (part[:240] for part in real())
    result = score(map(soften, pictures), [s.claim for s in scenes])
    assert result["mean_over_samples"] >= 0.98


# ---- reader on pictures made by hand --------------------------------------------------------------------

PAIR = (thing("circle", "red", 18, 32), thing("square", "blue", 46, 32))
CIRCLE, SQUARE = Noun("circle"), Noun("square")
RED_CIRCLE, BLUE_SQUARE = Noun("circle", color="red"), Noun("square", color="blue")

TABLE = [
    # single object: shape, and size where it is told; a stranger beside it is a fault
    ((thing("cross", radius=18, x=32),), single("cross"), True),
    ((thing("cross", radius=18, x=32),), single("cross", size="large"), True),
    ((thing("cross", radius=18, x=32),), single("cross", size="small"), False),
    ((thing("cross", radius=11),), single("cross", size="small"), True),
    ((thing("cross", radius=11),), single("square"), False),
    (PAIR, single("circle"), False),
    ((), single("circle"), False),
    # two objects
    (PAIR, Claim("two_object", (CIRCLE, SQUARE)), True),
    (PAIR, Claim("two_object", (SQUARE, CIRCLE)), True),
    (PAIR[:1], Claim("two_object", (CIRCLE, SQUARE)), False),
    (PAIR, Claim("two_object", (CIRCLE, Noun("triangle"))), False),
    ((*PAIR, thing(x=32, y=12, radius=8)), Claim("two_object", (CIRCLE, SQUARE)), False),
    # counting: exactly so many of the shape
    ((thing(x=18), thing(x=46)), Claim("counting", (Noun("circle", count=2),)), True),
    ((thing(x=18), thing(x=46)), Claim("counting", (Noun("circle", count=3),)), False),
    ((thing(x=18),), Claim("counting", (Noun("circle", count=2),)), False),
    (
        (thing(x=18), thing(x=46, y=14), thing(x=46, y=50)),
        Claim("counting", (Noun("circle", count=2),)),
        False,
    ),
    (
        (thing(x=18), thing(x=46, y=14), thing(x=46, y=50)),
        Claim("counting", (Noun("circle", count=3),)),
        True,
    ),
    ((*PAIR, thing(x=32, y=12, radius=8)), Claim("counting", (Noun("circle", count=2),)), False),
    # colours
    (PAIR[:1], single("circle", category="colors", color="red"), True),
    (PAIR[:1], single("circle", category="colors", color="purple"), False),
    (PAIR, single("circle", category="colors", color="red"), False),
    # position
    (PAIR, Claim("position", (CIRCLE, SQUARE), "left of"), True),
    (PAIR, Claim("position", (SQUARE, CIRCLE), "right of"), True),
    (PAIR, Claim("position", (CIRCLE, SQUARE), "right of"), False),
    (PAIR, Claim("position", (CIRCLE, SQUARE), "above"), False),
    ((*PAIR, thing("cross", x=32, y=12, radius=8)), Claim("position", (CIRCLE, SQUARE), "left of"), False),
    (PAIR, Claim("position", (CIRCLE, Noun("cross")), "left of"), False),
    (
        (thing(x=32, y=46), thing("cross", x=32, y=18)),
        Claim("position", (CIRCLE, Noun("cross")), "below"),
        True,
    ),
    (
        (thing(x=32, y=46), thing("cross", x=32, y=18)),
        Claim("position", (CIRCLE, Noun("cross")), "above"),
        False,
    ),
    # attribute binding
    (PAIR, Claim("color_attr", (RED_CIRCLE, BLUE_SQUARE)), True),
    (PAIR, Claim("color_attr", (Noun("circle", color="blue"), Noun("square", color="red"))), False),
    (PAIR[:1], Claim("color_attr", (RED_CIRCLE, BLUE_SQUARE)), False),
    ((*PAIR, thing("cross", x=32, y=12, radius=8)), Claim("color_attr", (RED_CIRCLE, BLUE_SQUARE)), False),
]


@pytest.mark.parametrize(("things", "claim", "expected"), TABLE)
def test_truth_table(things, claim, expected):
    assert holds(render(things), claim) is expected
    assert true_of(things, claim) is expected


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_color(shape, color):
    (seen,) = read(render((thing(shape, color, 30, 33, 9.5),)))
    assert (seen.shape, seen.color) == (shape, color)


def test_touching_objects_of_two_colors_are_told_apart():
    things = (thing("square", "red", 20), thing("square", "black", 40.2))
    assert [(o.shape, o.color) for o in read(render(things))] == [("square", "red"), ("square", "black")]


@pytest.mark.parametrize("shape", ["circle", "triangle", "cross"])
def test_touching_objects_of_one_color_are_counted(shape):
    claim = Claim("counting", (Noun(shape, count=2),))
    assert holds(render((thing(shape, x=20.5), thing(shape, x=43.3))), claim)


def test_a_bar_is_not_two_squares():
    picture = render(())
    picture[10:20, 10:30] = COLORS["red"]
    assert [o.shape for o in read(picture)] == [None]


# ---- what must fail -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [9.5, 11.5, 18.0])
def test_half_a_shape_is_none(shape, radius):
    for half in (np.s_[:, :32], np.s_[:, 32:], np.s_[:32]):  # the top of a triangle is a triangle
        picture = render((thing(shape, "red", 32, 32, radius),))
        picture[half] = BACKGROUND
        assert not holds(picture, single(shape)), (shape, half)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_with_a_large_hole_is_none(shape):
    whole, hole = (thing(shape, "blue", 32, 32, r) for r in (18.0, 9.5))
    picture = np.where((render((hole,)) != BACKGROUND).any(-1, keepdims=True), BACKGROUND, render((whole,)))
    assert not holds(picture.astype(np.uint8), single(shape))


def test_a_blob_is_none():
    y, x = np.mgrid[0:SIZE, 0:SIZE] - 31.5
    blobs = {
        "ellipse": np.hypot(x, 1.6 * y) < 18,
        "half moon": (np.hypot(x, y) < 18) & (np.hypot(x - 8, y) > 12),
        "triangle upside down": render((thing("triangle", x=32, radius=18),))[::-1, :, 1] < 100,
        "lopsided": (np.hypot(x, y) < 12) | (np.hypot(x - 12, y - 9) < 7),
    }
    for name, mask in blobs.items():
        picture = np.where(mask[..., None], COLORS["red"], BACKGROUND).astype(np.uint8)
        assert [o.shape for o in read(picture)] == [None], name


def test_a_shape_of_two_colors_is_none():
    picture = render((thing("circle", "red", 32, 32, 18.0),))
    picture[32:] = render((thing("circle", "blue", 32, 32, 18.0),))[32:]
    assert not holds(picture, single("circle"))


def test_a_color_of_no_name_is_none():
    picture = np.where(render((thing(),)) == BACKGROUND, BACKGROUND, (120, 120, 110)).astype(np.uint8)
    assert [o.color for o in read(picture)] == [None]


def test_heavy_damage_fails():
    scenes, pictures = (part[:120] for part in real())
    claims = [s.claim for s in scenes]
    empty = np.broadcast_to(np.array(BACKGROUND, np.uint8), (SIZE, SIZE, 3))
    share = {
        "empty": score([empty] * 120, claims),
        "blur": score([blurred(p, 5) for p in pictures], claims),
        "channels turned": score([np.roll(p, 1, -1) for p in pictures], claims),
    }
    assert share["empty"]["mean_over_samples"] == 0.0
    assert share["blur"]["mean_over_samples"] < 0.4
    assert share["channels turned"]["categories"]["color_attr"]["share"] < 0.1


def test_a_picture_of_everything_suits_no_caption():
    """Every shape in every colour, small, in rows: 24 objects that the reader all sees."""
    kinds = [(shape, color) for shape in SHAPES for color in COLORS]
    places = [(7.0 + 12.5 * (i % 5), 7.0 + 12.5 * (i // 5)) for i in range(len(kinds))]
    everything = tuple(thing(*kind, *place, 5.8) for kind, place in zip(kinds, places, strict=True))
    picture = render(everything)
    found = read(picture)
    assert len(found) == 24 and len({(o.shape, o.color) for o in found if o.shape}) >= 22
    claims = [s.claim for s in real()[0]]
    assert sum(check(found, claim) for claim in claims) <= 0.1 * len(claims)


def test_a_scribble_beside_what_was_asked_for_fails():
    picture = render(PAIR)
    picture[2:8, 20:44] = COLORS["black"]
    assert sorted(o.shape or "" for o in read(picture)) == ["", "circle", "square"]
    assert not holds(picture, Claim("two_object", (CIRCLE, SQUARE)))


def test_noise_shows_nothing():
    rng = np.random.default_rng(3)
    pictures = [rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(60)]
    assert score(pictures, [s.claim for s in real()[0][:60]])["mean_over_samples"] == 0.0


# ---- score ----------------------------------------------------------------------------------------------


def test_the_two_means_differ_where_categories_differ_in_size():
    yes, no = render(PAIR[:1]), render(())
    claims = [single("circle")] * 3 + [Claim("two_object", (CIRCLE, SQUARE))]
    result = score([yes, yes, no, no], claims)
    assert result["mean_over_samples"] == pytest.approx(2 / 4)
    assert result["mean_over_categories"] == pytest.approx((2 / 3 + 0) / 2)
    assert result["categories"]["single_object"] == {"share": pytest.approx(2 / 3), "n": 3}
    assert set(result["categories"]) == {"single_object", "two_object"}


def test_wrong_input_is_refused():
    with pytest.raises(SprintError, match=r"got float32 \[64, 64, 3\]"):
        read(np.zeros((64, 64, 3), np.float32))
    with pytest.raises(SprintError, match="no picture to score"):
        score([], [])
    with pytest.raises(ValueError, match="zip"):
        score([render(PAIR)], [single("circle")] * 2)
