"""What a recipe and a teacher must fit in, before training starts."""

from collections.abc import Mapping

from sprint.base.errors import SprintError
from sprint.engine.engine import Engine
from sprint.models.families import family_of_size
from sprint.models.taps import check_taps
from sprint.recipe.schema import Recipe


def check_share(recipe: Recipe, engine: Engine) -> None:
    """Raise SprintError if the batch does not divide over the processes in whole groups of neighbours.

    Neighbours share statistics and swap prompts: a cut of the batch, or an end, may not leave one alone.
    """
    settings, share = recipe.distill, len(engine.share(recipe.distill.batch_size))
    neighbours = settings.adversarial.neighbours
    if settings.adversarial.weight == 0:
        return
    if engine.processes > 1 and share % neighbours:
        raise SprintError(
            f"distill.batch_size = {settings.batch_size} leaves {share} samples to each of {engine.processes} "
            f"processes, which distill.adversarial.neighbours = {neighbours} does not divide; change one of them"
        )
    if settings.adversarial.misaligned_pairs and (share % neighbours == 1 or neighbours == 1):
        raise SprintError(
            f"misaligned pairs need at least 2 neighbours, and {share} samples in groups of {neighbours} leave "
            "1 alone; change distill.batch_size or distill.adversarial.neighbours"
        )


def check_teacher(recipe: Recipe, config: Mapping, depth: int) -> None:
    """Raise a `SprintError` where a teacher of this config has no block that the discriminator taps, or another size
    than the recipe's `arch`.
    """
    if recipe.arch:
        _check_arch(recipe, config)
    if recipe.distill.adversarial.weight > 0:
        check_taps(recipe.distill.adversarial.taps, depth)


def _check_arch(recipe: Recipe, config: Mapping) -> None:
    family = family_of_size(recipe.arch)
    expected = family.preset_config(recipe.arch)
    for key in family.size_fields:
        if config.get(key) != expected[key]:
            raise SprintError(
                f"arch = {recipe.arch} has {key} = {expected[key]}, but {recipe.teacher} has {config.get(key)}"
            )
