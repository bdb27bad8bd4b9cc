"""Run by torchrun from test_engine.py: a few steps of each stage, saved by the main process."""

import sys
from pathlib import Path

import torch

from sprint.engine import Engine, take
from sprint.recipe import Precision
from sprint.train.adapt import AdaptStage
from sprint.train.distill import DistillStage
from tests.tiny import LATENT, snapshot, tiny_batch, tiny_network, tiny_null, tiny_recipe


def run(stage, engine: Engine, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        share = take(tiny_batch(8, seed=step), engine.share(8))
        losses.append(stage.update(step, share).read(engine)["loss"])
    return losses


def three_steps_of_each_stage(engine: Engine) -> dict:
    recipe = tiny_recipe()
    recipe.distill.adversarial.misaligned_pairs = False
    adapt = AdaptStage(recipe, engine, tiny_network(), tiny_null())
    result = {"processes": engine.processes, "adapt": {"losses": run(adapt, engine, 3)}}
    result["adapt"]["weights"] = snapshot(adapt.network)
    distill = DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)
    result["distill"] = {"losses": run(distill, engine, 4)}
    heads = {f"heads.{key}": value for key, value in snapshot(distill.heads).items()}
    result["distill"]["weights"] = snapshot(distill.student) | heads
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    engine = Engine(Precision.fp32)
    result = three_steps_of_each_stage(engine)
    if engine.main_process:
        torch.save(result, Path(sys.argv[1]) / "result.pt")
    engine.wait()
