"""What a recipe and a teacher must fit in, before training starts."""

from sprint.base.errors import SprintError
from sprint.engine.engine import Engine
from sprint.models.sana.presets import transformer_config
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
