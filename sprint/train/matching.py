"""What distribution matching trains beside the student: the fake score, held as the engine holds networks."""

import torch
from diffusers import ModelMixin

from sprint.engine.compiled import prepare_blocks
from sprint.engine.engine import Engine
from sprint.engine.held import Held
from sprint.models.fake_score import FakeScore, LowRankFakeScore
from sprint.recipe.schema import Recipe


def start_fake_score(recipe: Recipe, engine: Engine, adapted: ModelMixin, time_scale: float) -> Held:
    """It begins as the adapted teacher, in fp32, before that is frozen; what is random in it moves no other draw."""
    matching = recipe.distill.matching
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if matching.lora_rank == 0:
            full = FakeScore(adapted, time_scale).train()
            prepare_blocks(full.network, recipe.compile, recipe.activation_checkpointing)
            return engine.wrap(full, matching.optimizer)
        added = LowRankFakeScore(adapted, matching.lora_rank, time_scale)
    engine.frozen(added.network)
    added.additions.requires_grad_(True)
    prepare_blocks(added.network, recipe.compile, recipe.activation_checkpointing)
    return engine.replicated(added, matching.optimizer)
