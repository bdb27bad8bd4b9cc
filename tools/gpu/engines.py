"""Steps of stage 2 under each engine, and the same once more from a checkpoint. Run by `tools.gpu`, or by hand:

    python -m tools.gpu.engines FOLDER single
    torchrun --nproc_per_node 2 -m tools.gpu.engines FOLDER ddp fsdp2

The tiny architecture with random weights, in fp32. Writes FOLDER/ENGINE.json: the losses of every step, those of the
last steps after a checkpoint was read, and what held the weights. In one process ddp and fsdp2 take the path of
several, hooks and collectives and all.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from sprint.base.ending import run_to_end
from sprint.base.files import write_whole
from sprint.data.batch import Batch
from sprint.engine import checkpoint
from sprint.engine.batches import take, to_device
from sprint.engine.engine import Engine
from sprint.engine.held import Held, Replicated, RowSharded
from sprint.recipe.schema import (
    Adversarial,
    Distill,
    EngineKind,
    Optimizer,
    Precision,
    Recipe,
)
from sprint.train.distill import DistillStage
from tools.bench.measure import SIZES

SHARED_ENGINES = ("ddp", "fsdp2")
BATCH, STEPS, SAVED_AFTER = 8, 6, 2
LEARNING_RATE = 1e-5
TOLERANCE = 0.01  # of a loss: CUDA adds in no fixed order, and six steps let that grow


class OneOfSeveral(Engine):
    """An engine for several processes in the only one: its weights are held, and its sums taken, as by several."""

    def __init__(self, precision: Precision, kind: EngineKind):
        super().__init__(precision, kind)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.mesh = DeviceMesh(self.device.type, [0], mesh_dim_names=("shard",))

    def wrap(self, module: nn.Module, settings: Optimizer) -> Held:
        if self.asked is not EngineKind.fsdp2:
            return self.replicated(module, settings)
        self._place(module)
        self._shard(module)
        return RowSharded(module, settings, self.mesh)

    def replicated(self, module: nn.Module, settings: Optimizer) -> Held:
        self._place(module)
        return Replicated(module, settings)


def engine_of(kind: EngineKind) -> Engine:
    """In the processes that the launcher started; one alone stands for several unless the engine is `single`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    engine = Engine(Precision.fp32, kind)
    if engine.processes > 1 or kind is EngineKind.single:
        return engine
    return OneOfSeveral(Precision.fp32, kind)


def make_stage(engine: Engine) -> DistillStage:
    size = SIZES["tiny"]
    adversarial = Adversarial(taps=size.taps, optimizer=Optimizer(lr=LEARNING_RATE))
    optimizer = Optimizer(lr=LEARNING_RATE)
    settings = Distill(steps=100, batch_size=BATCH, adversarial=adversarial, optimizer=optimizer)
    settings.ema_decay = 0.9
    recipe = Recipe(name="engines", engine=engine.kind, distill=settings)
    teacher = size.teacher()
    null = tuple(tensor.to(engine.device) for tensor in size.text(1))
    return DistillStage(recipe, engine, teacher, null, size.latent)


def batch_of(step: int, engine: Engine) -> Batch:
    """This process's share of batch number `step`, the same on every device."""
    torch.manual_seed(step)
    batch = SIZES["tiny"].batch_of(BATCH)
    return to_device(take(batch, engine.share(BATCH)), engine.device)


def losses_of(stage: DistillStage, steps: range) -> list[float]:
    engine = stage.engine
    return [stage.update(step, batch_of(step, engine)).read(engine)["loss"] for step in steps]


def steps_under(engine: Engine, folder: Path) -> dict:
    """Losses of all steps, and of those after a checkpoint by another stage that began from it."""
    stage = make_stage(engine)
    losses = losses_of(stage, range(SAVED_AFTER))
    saver = checkpoint.Saver(folder, group=engine.new_gloo_group())
    saver.save(f"distill-{SAVED_AFTER}", stage.tensors(), stage.facts())
    saver.wait()
    losses += losses_of(stage, range(SAVED_AFTER, STEPS))
    resumed, newest = make_stage(engine), checkpoint.latest(folder)
    read = partial(checkpoint.read_tensors, newest, group=engine.hosts)
    resumed.load(read, checkpoint.read_facts(newest))
    return {
        "held": type(stage.generator.trained).__name__,
        "device": engine.device.type,
        "losses": losses,
        "losses_resumed": losses_of(resumed, range(SAVED_AFTER, STEPS)),
    }


def compare_engines(found: dict[str, dict]) -> dict[str, float]:
    """What `steps_under` gave, by engine, "single" among them.  -> largest difference of a loss from single's

    Differences are relative where the loss is above 1. Raises RuntimeError for one above TOLERANCE, or NaN.
    """
    expected, differences = found["single"]["losses"], {}
    for kind, each in found.items():
        runs = (each["losses"], each["losses"][:SAVED_AFTER] + each["losses_resumed"])
        gaps = [abs(a - b) / max(1.0, abs(b)) for run in runs for a, b in zip(run, expected, strict=True)]
        if not all(gap <= TOLERANCE for gap in gaps):
            raise RuntimeError(f"{kind} has other losses than single: {runs}, not {expected}")
        differences[kind] = max(gaps)
    return differences


def main(folder: str, *kinds: str) -> None:
    for kind in kinds:
        engine = engine_of(EngineKind(kind))
        found = steps_under(engine, Path(folder) / "checkpoints" / kind)
        if engine.main_process:
            write_whole(Path(folder) / f"{kind}.json", json.dumps(found))


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
