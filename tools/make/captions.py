"""Fuller captions for training the teacher: the same scenes, told with more of what is in them.

An ordinary caption of a position names no colour, and one of two colours names no place, so that each tells little
of what belongs to what. A fuller one may name colour, size, number and relation at once. What is scored, and what
students train on, are the ordinary captions of `sprint.lab.scenes`.
"""

from dataclasses import replace

import numpy as np

from sprint.lab.scenes import RADIUS, Claim, Noun, Scene, Thing, caption_of

NAMES_COLOR, NAMES_RELATION, NAMES_SIZE = 0.75, 0.75, 0.5  # how often, where there is one


def described(rng: np.random.Generator, scene: Scene) -> Scene:
    """The same things under a new caption and its claim, which is true of them; the category stays."""
    claim = _fuller(rng, scene)
    return replace(scene, caption=caption_of(rng, claim), claim=claim)


def _fuller(rng: np.random.Generator, scene: Scene) -> Claim:
    category, things = scene.claim.category, scene.things
    if len(things) == 1:
        return Claim(category, (_noun(rng, things[0], sized=True),))
    if len({thing.shape for thing in things}) == 1:
        return Claim(category, (replace(_noun(rng, things[0]), count=len(things)),))
    first, second = (things[i] for i in rng.permutation(2))
    nouns = _noun(rng, first), _noun(rng, second)
    return Claim(category, nouns, relation_of(first, second) if rng.random() < NAMES_RELATION else None)


def _noun(rng: np.random.Generator, thing: Thing, sized: bool = False) -> Noun:
    """Only things that are alone in their scene have a size: others are drawn smaller."""
    size = next((name for name, radius in RADIUS.items() if radius == thing.radius), None) if sized else None
    return Noun(
        thing.shape,
        color=thing.color if rng.random() < NAMES_COLOR else None,
        size=size if rng.random() < NAMES_SIZE else None,
    )


def relation_of(first: Thing, second: Thing) -> str:
    """How the first stands to the second, along the axis on which they are further apart."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"
