"""What a recipe and a teacher must fit in, before training starts."""

from sprint.base.errors import SprintError
from sprint.models.sana.presets import transformer_config
from sprint.recipe.schema import Recipe


def check_taps(recipe: Recipe, depth: int) -> None:
    """Raise a `SprintError` if the discriminator taps a block that a teacher of `depth` blocks has not."""
    taps = list(recipe.distill.adversarial.taps)
    if recipe.distill.adversarial.weight > 0 and any(tap >= depth for tap in taps):
        raise SprintError(f"distill.adversarial.taps = {taps}, but the teacher's blocks are 0 to {depth - 1}")


def check_arch(recipe: Recipe, config: dict) -> None:
    """Raise a `SprintError` if the recipe says `arch` and the teacher, by its config, has another size."""
    if not recipe.arch:
        return
    expected = transformer_config(recipe.arch)
    for key in ("num_layers", "num_attention_heads", "attention_head_dim"):
        if config[key] != expected[key]:
            raise SprintError(
                f"arch = {recipe.arch} has {key} = {expected[key]}, but {recipe.teacher} has {config[key]}"
            )
