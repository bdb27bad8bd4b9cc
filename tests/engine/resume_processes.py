"""Forked for test_resume.py: each engine goes on from one checkpoint, and leaves its own.

torchrun --nproc_per_node 2 -m tests.engine.resume_processes FOLDER ddp fsdp2 ...
"""

import sys
from functools import partial
from pathlib import Path

import torch

from sprint.base.ending import run_to_end
from sprint.engine import checkpoint
from sprint.engine.batches import take
from sprint.engine.engine import Engine
from sprint.recipe.schema import EngineKind, Optimizer, OptimizerKind, Precision
from sprint.train.distill import DistillStage
from tests.engine.engine_processes import BATCH, recipe_for_engines
from tests.tiny import LATENT, tiny_batch, tiny_network, tiny_null

START, MIDDLE, END = 4, 8, 12  # steps done when one engine leaves, the next, and the last


def stage_of(engine: Engine, came: bool) -> DistillStage:
    recipe = recipe_for_engines()
    if came:
        recipe.distill.optimizer = Optimizer(OptimizerKind.came, lr=1e-4, warmup_steps=20)
    return DistillStage(recipe, engine, tiny_network(seed=3), tiny_null(), LATENT)


def steps(stage: DistillStage, engine: Engine, done: int, until: int) -> list[float]:
    """-> losses"""
    found = []
    for step in range(done, until):
        share = take(tiny_batch(BATCH, seed=step), engine.share(BATCH))
        found.append(stage.update(step, share).read(engine)["loss"])
    return found


def leave(stage: DistillStage, engine: Engine, folder: Path) -> None:
    saver = checkpoint.Saver(folder, group=engine.new_gloo_group())
    saver.save("distill", stage.tensors(), stage.facts())
    saver.wait()


def arrive(stage: DistillStage, engine: Engine, folder: Path) -> None:
    path = Path(engine.broadcast_from_main(lambda: str(checkpoint.latest(folder))))
    stage.load(partial(checkpoint.read_tensors, path, group=engine.hosts), checkpoint.read_facts(path))


def main(folder: str, *cases: str) -> None:
    torch.set_num_threads(1)
    root, found = Path(folder), {}
    for case in cases:
        kind, _, optimizer = case.partition("-")
        engine = Engine(Precision.fp32, EngineKind(kind))
        stage = stage_of(engine, came=optimizer == "came")
        arrive(stage, engine, root / (optimizer or "adamw"))
        found[case] = steps(stage, engine, START, MIDDLE)
        leave(stage, engine, root / case)
    if torch.distributed.get_rank() == 0:
        torch.save(found, root / "result.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
