"""The real networks of a recipe on the meta device, where they have no memory behind them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import nn

from sprint.base.door import at_home, check_no_address, read_json
from sprint.base.errors import SprintError
from sprint.base.names import resolve
from sprint.models.discriminator import DiscriminatorHeads
from sprint.models.families import check_role, family_of_size
from sprint.models.low_rank import add_low_rank, twin
from sprint.models.teacher import Sizes, Teacher
from sprint.recipe.schema import Recipe
from sprint.train.checks import check_teacher
from sprint.weights.checkpoint import understand


@dataclass(frozen=True)
class Networks:
    """What a run trains and uses, on the meta device."""

    family: Teacher
    sizes: Sizes  # the teacher's
    teacher: ModelMixin
    adapted: ModelMixin
    student: nn.ModuleDict  # the network and its logvar head
    heads: DiscriminatorHeads
    tokens: int  # latent cells that the network sees
    latent_numel: int  # numbers in the latent of one picture

    @property
    def student_depth(self) -> int:
        """Blocks of the student."""
        return self.family.sizes(self.student["network"].config).depth


def build_networks(recipe: Recipe) -> Networks:
    """Teacher, adapted teacher, student and heads of a recipe, on the meta device."""
    family, config = teacher_config(recipe)
    sizes = family.sizes(config)
    check_teacher(recipe, config, sizes.depth)
    tokens = _tokens(recipe, family, sizes.patch)
    return networks_of(family, config, len(recipe.distill.adversarial.taps), tokens, recipe.distill.depth)


def networks_of(family: Teacher, config: dict, taps: int, tokens: int, depth: int = 0) -> Networks:
    """The networks of a teacher with this `config`, on the meta device.

    tokens   latent cells of a picture
    depth    blocks of the student; 0: the teacher's
    """
    sizes, adapted = family.sizes(config), family.adapted_config(config)
    student = family.meta_network(family.with_depth(family.student_config(adapted), depth or sizes.depth))
    with torch.device("meta"):
        logvar, heads = nn.Linear(sizes.width, 1), DiscriminatorHeads(sizes.width, taps)
    return Networks(
        family=family,
        sizes=sizes,
        teacher=family.meta_network(config),
        adapted=family.meta_network(adapted),
        student=nn.ModuleDict({"network": student, "logvar": logvar}),
        heads=heads,
        tokens=tokens,
        latent_numel=sizes.channels * tokens * sizes.patch**2,
    )


def fake_score_of(recipe: Recipe, networks: Networks) -> nn.Module:
    """What distribution matching trains: a network as deep as the teacher, or additions to the teacher's blocks."""
    rank, family = recipe.distill.matching.lora_rank, networks.family
    if rank == 0:
        return family.meta_network(family.student_config(networks.adapted.config))
    return add_low_rank(networks.family.blocks(twin(networks.adapted)), rank)


def teacher_config(recipe: Recipe) -> tuple[Teacher, dict]:
    """The teacher's family and architecture: from its files if they are on disk, else the preset named by `arch`."""
    check_no_address(recipe.teacher)
    path = at_home(resolve(recipe.teacher))
    if not path.exists():
        if not recipe.arch:
            raise SprintError(
                f"{recipe.teacher}: not on disk; for a dry run without it, set arch=0.6b (or 1.6b, 4.8b)"
            )
        family = family_of_size(recipe.arch)
        return family, family.preset_config(recipe.arch)
    checkpoint = understand(path)
    check_role(recipe.teacher, checkpoint.family, checkpoint.config, student=False)
    return checkpoint.family, checkpoint.config


def _tokens(recipe: Recipe, family: Teacher, patch: int) -> int:
    config = Path(resolve(recipe.teacher_family or recipe.teacher)) / "vae" / "config.json"
    cell = family.downscale(read_json(config) if config.is_file() else None) * patch
    if recipe.data.size % cell:
        raise SprintError(f"data.size = {recipe.data.size}, but it must be a multiple of {cell}")
    return (recipe.data.size // cell) ** 2
