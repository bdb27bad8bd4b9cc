"""How a batch is shared: over processes, in whole groups of neighbours, in parts of them."""

import math
from collections.abc import Iterator

from sprint.base.errors import SprintError
from sprint.recipe.schema import Distill, NormGroups, Recipe


def share_of(batch_size: int, rank: int, processes: int, key: str = "batch_size") -> range:
    """The places in a batch that fall to process `rank`: consecutive, in order of rank.

    Raises SprintError, naming `key`, where the batch does not divide evenly.
    """
    share, rest = divmod(batch_size, processes)
    if rest:
        raise SprintError(f"{key} = {batch_size} does not divide over {processes} processes")
    return range(rank * share, (rank + 1) * share)


def check_shares(recipe: Recipe, processes: int) -> None:
    """Raise the first of `misfits` as a SprintError."""
    for problem in misfits(recipe, processes):
        raise SprintError(problem)


def misfits(recipe: Recipe, processes: int) -> Iterator[str]:
    """What keeps the batches of the stages that the recipe takes from so many processes, one line for each stage.

    Neighbours share statistics and swap prompts: no cut of a batch may part them, and none may stand alone.
    """
    for stage, settings in (("adapt", recipe.adapt), ("distill", recipe.distill)):
        if settings.steps > 0:
            try:
                share = len(share_of(settings.batch_size, 0, processes, f"{stage}.batch_size"))
            except SprintError as error:
                yield str(error)
            else:
                if stage == "distill" and recipe.distill.adversarial.weight > 0:
                    yield from _parted(recipe, share, processes)
                if stage == "distill" and recipe.distill.trajectories.states:
                    yield from _torn(recipe, processes)


def _parted(recipe: Recipe, share: int, processes: int) -> Iterator[str]:
    adversarial, batch_size = recipe.distill.adversarial, recipe.distill.batch_size
    neighbours, key = adversarial.neighbours, "distill.adversarial.neighbours"
    alone = share % neighbours == 1 or neighbours == 1
    if processes > 1 and share % neighbours:
        fewer = math.gcd(share, neighbours)
        yield (
            f"distill.batch_size = {batch_size} leaves each of {processes} processes a share of {share}, which "
            f"{key} = {neighbours} does not divide; set {f'that to {fewer}, or ' if fewer > 1 else ''}"
            f"distill.batch_size to {processes * neighbours}"
        )
    elif adversarial.misaligned_pairs and alone:
        yield (
            f"misaligned pairs need at least 2 neighbours, and a share of {share} in groups of {neighbours} "
            f"leaves 1 alone; change distill.batch_size or {key}"
        )
    elif adversarial.norm_groups is NormGroups.separate and share % neighbours:
        yield (
            f"distill.batch_size = {batch_size} leaves {share % neighbours} in place of {key} = {neighbours}, and with "
            "distill.adversarial.norm_groups = separate samples of another kind would fill their group; set "
            f"distill.batch_size to a multiple of {neighbours}"
        )
    elif recipe.micro_batch_size % neighbours:
        yield (
            f"micro_batch_size = {recipe.micro_batch_size}, but it must be a multiple of {key} = {neighbours}"
        )


def groups_of(distill: Distill) -> int:
    """Trajectories side by side in a batch, before their next states: neighbours swap prompts, so they need several."""
    return distill.adversarial.neighbours if distill.adversarial.weight > 0 else 1


def _torn(recipe: Recipe, processes: int) -> Iterator[str]:
    distill = recipe.distill
    count, group = distill.batch_size // distill.trajectories.states, groups_of(distill)
    if count % (processes * group):
        whole = processes * group * distill.trajectories.states
        of_group = f" in groups of distill.adversarial.neighbours = {group}" if group > 1 else ""
        yield (
            f"distill.batch_size = {distill.batch_size} with distill.trajectories.states = "
            f"{distill.trajectories.states} takes {count} trajectories, which do not divide over {processes} "
            f"processes{of_group}; set distill.batch_size to a multiple of {whole}"
        )
