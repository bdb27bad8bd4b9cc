"""Whose turn it is: the kinds of updates of stage 2, one after the other, over and over."""

from sprint.recipe.schema import Distill

GENERATOR, DISCRIMINATOR, FAKE_SCORE = "G", "D", "F"


def cycle(settings: Distill) -> tuple[str, ...]:
    """The student; the heads, if LADD is on; with distribution matching the fake score, as often as it is to be."""
    matching = settings.matching
    heads = (DISCRIMINATOR,) if settings.adversarial.weight > 0 else ()
    fake_score = (FAKE_SCORE,) * matching.updates if matching.weight > 0 else ()
    return (GENERATOR, *heads, *fake_score)


def turn(step: int, settings: Distill) -> str:
    """Of step number `step`, from 0."""
    turns = cycle(settings)
    return turns[step % len(turns)]
