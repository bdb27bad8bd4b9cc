"""Captioned scenes: an endless, deterministic picture source that needs no download.

A scene is one to three flat shapes on one background, 64×64 RGB, with a caption and a `Claim`: what the
caption says, in a form that `sprint.evaluate.scenes` can check against pixels. Six categories follow
GenEval (arXiv 2310.11513). Scene `index` of `seed` is always the same scene.
"""

from dataclasses import dataclass

import numpy as np

from sprint.lab.categories import CATEGORY_TITLES

SIZE = 64  # pixels, height and width
BACKGROUND = (236, 233, 226)
COLORS = {
    "red": (214, 48, 49),
    "green": (46, 164, 79),
    "blue": (41, 98, 214),
    "yellow": (245, 205, 48),
    "purple": (146, 64, 180),
    "black": (32, 32, 36),
}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = {1: "one", 2: "two", 3: "three"}
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = tuple(CATEGORY_TITLES)

RADIUS = {"large": 18.0, "small": 11.0}  # pixels, for a scene of one object
RADIUS_BY_COUNT = {2: 11.5, 3: 9.5}  # pixels; more objects are drawn smaller
LOW, HIGH, JITTER = 18.0, 46.0, 3.0  # pixels: the two lanes of the 2×2 layout


@dataclass(frozen=True)
class Thing:
    """One object. `x`, `y`: centre in pixels from the top left; `radius`: half its extent in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Noun:
    """What a caption says of one kind of object; None where it says nothing."""

    shape: str
    color: str | None = None
    size: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Claim:
    """What a caption says. `relation` holds between the first noun and the second."""

    category: str
    nouns: tuple[Noun, ...]
    relation: str | None = None


@dataclass(frozen=True)
class Scene:
    """A claim, the words that make it, and the objects that make it true."""

    caption: str
    claim: Claim
    things: tuple[Thing, ...]


def scene(seed: int, index: int, category: str | None = None) -> Scene:
    """Scene number `index` of the endless series `seed`; categories take turns unless one is named."""
    rng = np.random.default_rng([seed, index])
    category = category or CATEGORIES[index % len(CATEGORIES)]
    make = {
        "single_object": _single,
        "two_object": _two,
        "counting": _counting,
        "colors": _single,
        "position": _position,
        "color_attr": _two,
    }[category]
    claim, things = make(rng, category)
    return Scene(caption_of(rng, claim), claim, things)


def render(things: tuple[Thing, ...], size: int = SIZE) -> np.ndarray:
    """Draw the objects with one-pixel antialiased edges.  -> uint8 [size, size, 3]"""
    y, x = np.mgrid[0:size, 0:size] + 0.5
    picture = np.broadcast_to(np.array(BACKGROUND, float), (size, size, 3))
    for thing in things:
        distance = _signed_distance(thing.shape, x - thing.x, y - thing.y, thing.radius)
        coverage = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
        picture = picture * (1 - coverage) + np.array(COLORS[thing.color], float) * coverage
    return np.round(picture).astype(np.uint8)


def _signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    """Pixels to the outline, negative inside."""
    if shape == "circle":
        return np.hypot(dx, dy) - r
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) - 0.88 * r
    if shape == "triangle":  # apex up, base at +0.85 r
        slope = np.hypot(1.85, 1.0)
        return np.maximum(dy - 0.85 * r, (1.85 * abs(dx) - dy - r) / slope)
    if shape == "cross":
        arm = 0.33 * r
        return np.minimum(np.maximum(abs(dx) - arm, abs(dy) - r), np.maximum(abs(dx) - r, abs(dy) - arm))
    raise ValueError(f"no such shape: {shape}")


def _single(rng, category):
    shape, color, size = rng.choice(SHAPES), rng.choice(list(COLORS)), rng.choice(list(RADIUS))
    radius = RADIUS[size]
    x, y = rng.uniform(radius + 3, SIZE - radius - 3, size=2)
    said = Noun(
        str(shape),
        color=str(color) if category == "colors" else None,
        size=str(size) if rng.random() < 0.5 else None,
    )
    return Claim(category, (said,)), (Thing(str(shape), str(color), x, y, radius),)


def _two(rng, category):
    shapes = rng.choice(SHAPES, size=2, replace=False)
    colors = rng.choice(list(COLORS), size=2, replace=False)
    _, centres = _side_by_side(rng)
    things = tuple(_thing(s, c, p, 2) for s, c, p in zip(shapes, colors, centres, strict=True))
    named = category == "color_attr"
    nouns = tuple(Noun(t.shape, color=t.color if named else None) for t in things)
    return Claim(category, nouns), things


def _position(rng, category):
    relation, centres = _side_by_side(rng)
    shapes = rng.choice(SHAPES, size=2, replace=False)
    colors = rng.choice(list(COLORS), size=2, replace=False)
    things = tuple(_thing(s, c, p, 2) for s, c, p in zip(shapes, colors, centres, strict=True))
    return Claim(category, tuple(Noun(t.shape) for t in things), relation), things


def _counting(rng, category):
    count = int(rng.integers(2, 4))
    shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
    if count == 2:
        _, centres = _side_by_side(rng)
    else:
        corners = [(x, y) for x in (LOW, HIGH) for y in (LOW, HIGH)]
        keep = rng.permutation(4)[:3]
        centres = [np.array(corners[k]) + rng.uniform(-JITTER, JITTER, 2) for k in keep]
    things = tuple(_thing(shape, color, centre, count) for centre in centres)
    return Claim(category, (Noun(str(shape), count=count),)), things


def _side_by_side(rng) -> tuple[str, list[np.ndarray]]:
    """Where the first object stands to the second, and both centres (x, y) in pixels."""
    relation = str(rng.choice(RELATIONS))
    across = np.array([LOW, HIGH]) + rng.uniform(-JITTER, JITTER, 2)
    along = 32.0 + rng.uniform(-2 * JITTER, 2 * JITTER, 2)
    if relation in ("right of", "below"):
        across = across[::-1]
    sideways = relation in ("left of", "right of")
    pairs = zip(across, along, strict=True) if sideways else zip(along, across, strict=True)
    return relation, [np.array(pair) for pair in pairs]


def _thing(shape, color, centre, count) -> Thing:
    return Thing(str(shape), str(color), float(centre[0]), float(centre[1]), RADIUS_BY_COUNT[count])


TEMPLATES = ("{}", "a picture of {}", "there is {}", "{} on a plain background")
PLURAL_TEMPLATES = ("{}", "a picture of {}", "there are {}", "{} on a plain background")


def caption_of(rng: np.random.Generator, claim: Claim) -> str:
    """Words that say what the claim says, and nothing else."""
    first = claim.nouns[0]
    if first.count > 1:
        template = PLURAL_TEMPLATES[rng.integers(len(PLURAL_TEMPLATES))]
        said = (NUMBERS[first.count], first.color, _plural(first.shape))
        return template.format(" ".join(word for word in said if word))
    joint = f" {claim.relation} " if claim.relation else " and "
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    return template.format(joint.join(_phrase(noun) for noun in claim.nouns))


def _phrase(noun: Noun) -> str:
    return " ".join(word for word in ("a", noun.size, noun.color, noun.shape) if word)


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")
