"""Started for test_engine.py: steps of both stages under one engine, losses and weights to FOLDER.

torchrun --nproc_per_node 2 -m tests.engine.engine_processes FOLDER STEPS ENGINE:MICRO_BATCH:SHARD_SIZE:TEACHER:DEPTH…
"""

import sys
from pathlib import Path

import torch

from sprint.base.ending import run_to_end
from sprint.engine.batches import take
from sprint.engine.engine import Engine
from sprint.recipe.schema import EngineKind, Precision, Recipe
from sprint.train.adapt import AdaptStage
from sprint.train.distill import DistillStage
from tests.tiny import LATENT, tiny_batch, tiny_network, tiny_null, tiny_recipe

BATCH = 16
ADAPT_STEPS = 4


def recipe_for_engines(micro_batch: int = 0, depth: int = 0) -> Recipe:
    recipe = tiny_recipe()
    recipe.distill.depth = depth
    recipe.micro_batch_size = micro_batch
    recipe.adapt.batch_size = recipe.distill.batch_size = BATCH
    recipe.distill.steps = recipe.adapt.steps = 20
    recipe.distill.self_consistency = 1.0
    recipe.adapt.optimizer.lr = 1e-4  # at 1e-3 rounding grows a hundredfold in 20 steps, in one process too
    return recipe


def losses_of(stage, engine: Engine, steps: int) -> list[float]:
    found = []
    for step in range(steps):
        share = take(tiny_batch(BATCH, seed=step), engine.share(BATCH))
        found.append(stage.update(step, share).read(engine)["loss"])
    return found


def both_stages(engine: Engine, recipe: Recipe, steps: int) -> dict:
    """-> by stage: losses, and on the main process the weights of its result"""
    adapt = AdaptStage(recipe, engine, tiny_network(), tiny_null())
    found = {"adapt": {"losses": losses_of(adapt, engine, ADAPT_STEPS)}}
    distill = DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)
    found["distill"] = {"losses": losses_of(distill, engine, steps)}
    for stage in (adapt, distill):
        result = stage.result()
        if result is not None:
            found[stage.name]["weights"] = result.state_dict()
    return found


def run_case(case: str, steps: int) -> dict:
    kind, micro_batch, shard_size, teacher, depth = case.split(":")
    engine = Engine(Precision.fp32, EngineKind(kind), int(shard_size), shard_teacher=teacher == "sharded")
    found = both_stages(engine, recipe_for_engines(int(micro_batch), int(depth)), steps)
    return found | {"processes": engine.processes, "engine": str(engine)}


def main(folder: str, steps: str, *cases: str) -> None:
    torch.set_num_threads(1)
    found = {case: run_case(case, int(steps)) for case in cases}
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(folder) / "result.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
