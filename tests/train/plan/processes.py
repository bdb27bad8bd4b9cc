"""Forked for test_plan_engines.py: bytes that ZeRO holds between backward and update, to FOLDER/held.json."""

import gc
import json
import sys
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from torch import distributed as dist

from sprint.base.ending import run_to_end
from sprint.engine.zero import Zero
from sprint.models.sana.presets import transformer_config
from sprint.recipe.schema import Optimizer, OptimizerKind


class Velocity(nn.Module):
    """A small network that gives a plain tensor."""

    def __init__(self):
        super().__init__()
        self.network = SanaTransformer2DModel(**transformer_config("tiny"))

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        return self.network(x, text, t).sample


def held_bytes() -> int:
    """Of all tensors that Python can reach, each storage once."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor) and not each.is_meta]
    storages = [each.untyped_storage() for each in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def bytes_of(stage: int) -> int:
    """Of one network and its optimizer, in its third update: from the second on ZeRO-3 knows the order of layers."""
    before = held_bytes()
    settings = Optimizer(OptimizerKind.adamw, lr=1e-4, betas=(0.9, 0.99))
    trained = Zero(Velocity(), settings, stage)
    for _ in range(3):
        out = trained(torch.randn(1, 8, 1, 1), torch.randn(1, 1, 128), torch.ones(1))
        trained.backward(out.square().mean())
        del out
        held = held_bytes() - before
        trained.update()
    return held


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    held = {f"zero{stage}": bytes_of(stage) for stage in (2, 3)}
    if dist.get_rank() == 0:
        (folder / "held.json").write_text(json.dumps(held))
    dist.barrier()  # one that leaves early takes the other's connection with it


if __name__ == "__main__":
    run_to_end(lambda: main(Path(sys.argv[1])))
