"""What a recipe and a teacher must fit in, before training starts."""

from collections.abc import Mapping

from sprint.base.errors import SprintError
from sprint.models.depth import check_depth
from sprint.models.families import family_of_size
from sprint.models.taps import check_taps
from sprint.recipe.schema import Distill, Recipe


def check_teacher(recipe: Recipe, config: Mapping, depth: int) -> None:
    """Raise a `SprintError` where a teacher of this config has no block that the discriminator taps, more blocks than
    its student, or another size than the recipe's `arch`.
    """
    if recipe.arch:
        _check_arch(recipe, config)
    if recipe.distill.adversarial.weight > 0:
        check_taps(recipe.distill.adversarial.taps, depth)
    check_depth(recipe.distill.depth, depth)


def _check_arch(recipe: Recipe, config: Mapping) -> None:
    family = family_of_size(recipe.arch)
    expected = family.preset_config(recipe.arch)
    for key in family.size_fields:
        if config.get(key) != expected[key]:
            raise SprintError(
                f"arch = {recipe.arch} has {key} = {expected[key]}, but {recipe.teacher} has {config.get(key)}"
            )


def unlearned_guidance(recipe: Recipe) -> str:
    """Of the scale at which the student is to be drawn with, where it is outside of what it learns; else ""."""
    evaluate, scales = recipe.evaluate, recipe.distill.guidance_scales
    if not evaluate.prompts or min(scales) <= evaluate.guidance_scale <= max(scales):
        return ""
    return (
        f"evaluate.guidance_scale = {evaluate.guidance_scale:g}, but the student learns "
        f"distill.guidance_scales = {list(scales)} alone"
    )


def needs_teacher(distill: Distill) -> bool:
    """Whether stage 2 asks the adapted teacher: its features for LADD, its score for distribution matching, its
    velocity where no trajectory stores it.
    """
    velocity = distill.consistency.weight > 0 and not distill.trajectories.states
    return velocity or distill.adversarial.weight > 0 or distill.matching.weight > 0
