"""Forked for test_matching.py: updates with distribution matching under each engine, losses to FOLDER.

torchrun --nproc_per_node 2 -m tests.train.matching_processes FOLDER ddp:0 ddp:2 fsdp2:0 ...
"""

import sys
from pathlib import Path

import torch

from sprint.base.ending import run_to_end
from sprint.engine.engine import Engine
from sprint.recipe.schema import EngineKind, Matching, Optimizer, OptimizerKind, Precision
from sprint.train.distill import DistillStage
from tests.engine.engine_processes import losses_of, recipe_for_engines
from tests.tiny import LATENT, tiny_network, tiny_null

STEPS = 8  # two rounds


def losses_with(engine: Engine, rank: int) -> list[float]:
    recipe = recipe_for_engines()
    adamw = Optimizer(OptimizerKind.adamw, 1e-3, betas=(0.9, 0.99), clip_norm=1.0)
    recipe.distill.matching = Matching(weight=0.5, rollout=2, updates=2, lora_rank=rank, optimizer=adamw)
    stage = DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)
    return losses_of(stage, engine, STEPS)


def main(folder: str, *cases: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for case in cases:
        kind, rank = case.split(":")
        found[case] = losses_with(Engine(Precision.fp32, EngineKind(kind)), int(rank))
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(folder) / "result.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
