"""What tools/bench/engines.py measures, in the processes that torchrun started for it:

    torchrun --nproc_per_node 2 -m tools.bench.engine_cases losses FOLDER
    torchrun --nproc_per_node 2 -m tools.bench.engine_cases memory FOLDER

FOLDER holds the cases (WHAT-PROCESSES.json), and for losses the inputs that `prepare` wrote. The main process writes
what was found to found-WHAT-PROCESSES.json, one record for each case, in order.
"""

import gc
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.state import AcceleratorState
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from sprint.base.ending import run_to_end
from sprint.base.files import write_whole
from sprint.base.names import resolve
from sprint.data.batch import Batch
from sprint.engine.batches import take
from sprint.engine.engine import Engine
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import (
    Adversarial,
    Distill,
    EngineKind,
    Optimizer,
    OptimizerKind,
    Precision,
    Recipe,
    Text,
)
from sprint.train.adapt import AdaptStage
from sprint.train.distill import DistillStage
from sprint.train.run import Run
from sprint.train.start import start_of_adaptation
from sprint.weights.load import load_teacher
from tools.bench.measure import ROOT, SIZES, Size, peak_memory

BATCH, NEIGHBOURS = 16, 4
CAME = "{kind: came, betas: [0.9, 0.999, 0.9999]}"


class Case(NamedTuple):
    """How a step is computed, but for the number of processes."""

    engine: EngineKind = EngineKind.single
    micro_batch: int = 0
    shard_size: int = 0
    shard_teacher: bool = False
    precision: Precision = Precision.fp32
    optimizer: OptimizerKind = OptimizerKind.adamw

    def __str__(self) -> str:
        """As rows of the tables name it, without micro-batch, precision and optimizer."""
        copies = f", shards of {self.shard_size}" if self.shard_size else ""
        return self.engine.value + copies + ", teacher too" * self.shard_teacher

    @classmethod
    def of(cls, record: dict) -> "Case":
        """From JSON, as `_asdict` went into it."""
        kinds = {"engine": EngineKind, "precision": Precision, "optimizer": OptimizerKind}
        return cls(**record | {name: kind(record[name]) for name, kind in kinds.items()})


def engine_of(recipe: Recipe) -> Engine:
    AcceleratorState._reset_state()  # of precision; what it knows of processes stays
    return Engine.of(recipe)


# ---- losses -----------------------------------------------------------------------------------------


def losses_recipe(case: Case) -> Recipe:
    """The tiny recipe with another batch, and a tangent that counts in full from the generator's fourth update on."""
    came = case.optimizer is OptimizerKind.came
    return load_recipe(
        ROOT / "recipes" / "tiny.yaml",
        [
            f"engine={case.engine.value}",
            f"precision={case.precision.value}",
            f"shard_size={case.shard_size}",
            f"shard_teacher={str(case.shard_teacher).lower()}",
            f"micro_batch_size={case.micro_batch}",
            f"adapt.batch_size={BATCH}",
            f"distill.batch_size={BATCH}",
            f"distill.adversarial.neighbours={NEIGHBOURS}",
            "distill.consistency.tangent_warmup_updates=4",
            *([f"adapt.optimizer={CAME}", f"distill.optimizer={CAME}"] if came else []),
        ],
    )


class Inputs(NamedTuple):
    """What every case begins with: the calibrated teacher's folder, batches of real scenes, the empty prompt."""

    network: Path
    batches: list[Batch]
    null: tuple[Tensor, Tensor]


def prepare(folder: Path, steps: int) -> None:
    """The built-in teacher, calibrated for dense time and QK-norm, and `steps` batches of training scenes."""
    run = Run(losses_recipe(Case()), root=folder / "runs")
    network = start_of_adaptation(run.inputs, *load_teacher(resolve(run.recipe.teacher)))
    network.save_pretrained(folder / "network")
    source, tensors = run.inputs.source.batched(BATCH), {}
    for step in range(steps):
        batch = run.inputs.encode(source.samples(range(step * BATCH, (step + 1) * BATCH)))
        tensors |= {f"{step}.{name}": tensor.contiguous() for name, tensor in batch._asdict().items()}
    text, mask = run.inputs.null
    save_file(tensors | {"null.text": text, "null.mask": mask}, folder / "inputs.safetensors")


def read_inputs(folder: Path) -> Inputs:
    tensors = load_file(folder / "inputs.safetensors")
    steps = sum(name.endswith(".latent") for name in tensors)
    batches = [Batch(*(tensors[f"{step}.{name}"] for name in Batch._fields)) for step in range(steps)]
    return Inputs(folder / "network", batches, (tensors["null.text"], tensors["null.mask"]))


def losses_of(case: Case, inputs: Inputs, adapt_steps: int, distill_steps: int) -> dict:
    """The loss of every step of both stages, averaged over processes as the log has them."""
    recipe = losses_recipe(case)
    engine = engine_of(recipe)

    def steps_of(stage: AdaptStage | DistillStage, count: int) -> list[float]:
        share = engine.share(BATCH)
        return [
            stage.update(step, take(inputs.batches[step], share)).read(engine)["loss"]
            for step in range(count)
        ]

    def network() -> SanaTransformer2DModel:
        return SanaTransformer2DModel.from_pretrained(inputs.network)

    adapt = steps_of(AdaptStage(recipe, engine, network(), inputs.null), adapt_steps)
    latent_shape = tuple(inputs.batches[0].latent.shape[1:])
    stage = DistillStage(recipe, engine, network(), inputs.null, latent_shape)
    return {"engine": str(engine), "adapt": adapt, "distill": steps_of(stage, distill_steps)}


# ---- memory -----------------------------------------------------------------------------------------


def memory_size(network: str) -> Size:
    """The network of that name with small pictures and texts: weights are what memory is about here."""
    size = SIZES[network]
    return replace(size, config=size.config | {"sample_size": 4}, text_tokens=16)


def memory_recipe(case: Case, network: str) -> Recipe:
    """Four pictures on each of four processes; with an average, so that everything a run can hold is there."""
    adamw = Optimizer(OptimizerKind.adamw, lr=1e-4, betas=(0.9, 0.99))
    size = memory_size(network)
    return Recipe(
        name="bench",
        engine=case.engine,
        shard_size=case.shard_size,
        shard_teacher=case.shard_teacher,
        precision=case.precision,
        text=Text(max_length=size.text_tokens),
        distill=Distill(
            batch_size=BATCH,
            ema_decay=0.999,
            optimizer=adamw,
            adversarial=Adversarial(taps=size.taps, neighbours=NEIGHBOURS, optimizer=adamw),
        ),
    )


class Held:
    """Bytes by part that stay from update to update, with gradients; stands in for the stage's clock to see them.

    Counted when the optimizer of the generator's second update is about to begin: its graph is gone, and every
    gradient and every state is there. Each storage counts once, in the first part that has it.
    """

    def __init__(self):
        self.before = storages(live_tensors())  # held on to, so that no new one takes their place
        self.stage: DistillStage | None = None
        self.parts: dict[str, int] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if name == "optimizer":
            self.parts = self.count()
        yield

    def count(self) -> dict[str, int]:
        stage, trained = self.stage, self.stage.generator.trained
        groups = {
            "weights": trained.local().values(),
            "optimizer state": states_of(trained.optimizer),
            "EMA": stage.ema.shadow.values(),
            "teacher": stage.teacher.network.parameters(),
            "heads": heads_of(stage),
            "gradients and the rest": live_tensors(),
        }
        seen, parts = set(self.before), {}
        for name, tensors in groups.items():
            new = {key: size for key, size in storages(tensors).items() if key not in seen}
            seen |= new.keys()
            parts[name] = sum(storage.nbytes() for storage in new.values())
        return parts


def states_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [tensor for state in optimizer.state.values() for tensor in state.values()]


def heads_of(stage: DistillStage) -> list[Tensor]:
    weights = list(stage.heads.parameters())
    return [
        *weights,
        *(p.grad for p in weights if p.grad is not None),
        *states_of(stage.discriminator.trained.optimizer),
    ]


def live_tensors() -> list[Tensor]:
    """All that Python can reach, and their gradients, of which Python hears when it asks for them."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    gradients = [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    return tensors + gradients


def storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The memory under them; of a distributed tensor what is here."""
    here = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    found = [each.untyped_storage() for each in here if not each.is_meta]
    return {storage._cdata: storage for storage in found}


def memory_of(case: Case, network: str) -> dict:
    """Bytes in the process that has most: by part between updates, and resident at the highest point of them all."""
    held, size, recipe = Held(), memory_size(network), memory_recipe(case, network)
    engine = engine_of(recipe)

    def updates() -> None:
        stage = DistillStage(recipe, engine, size.teacher(), size.text(1), size.latent)
        held.stage = stage
        stage.clock = held
        batch = take(size.batch_of(BATCH), engine.share(BATCH))
        for step in range(3):  # G D G
            stage.update(step, batch)
        held.stage = None

    mine = {"engine": str(engine), "resident": peak_memory(updates), "parts": held.parts}
    everyone = [mine] * engine.processes
    if engine.processes > 1:
        dist.all_gather_object(everyone, mine)
    most = max(everyone, key=lambda each: sum(each["parts"].values()))
    return most | {"resident": max(each["resident"] for each in everyone)}


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    processes = Engine(Precision.fp32, EngineKind.ddp).processes
    asked = json.loads((folder / f"{what}-{processes}.json").read_text())
    inputs = read_inputs(folder) if what == "losses" else None
    if not inputs:
        # once for nothing: the first updates of a process allocate what is not theirs
        memory_of(Case.of(asked["cases"][0]), "tiny")
    found = []
    for record in tqdm(asked["cases"], desc=f"{what}, {processes} processes", leave=False):
        case = Case.of(record)
        try:
            if inputs:
                found.append(losses_of(case, inputs, asked["adapt_steps"], asked["distill_steps"]))
            else:
                found.append(memory_of(case, asked["network"]))
        except Exception as error:
            raise RuntimeError(f"{record}: {error}") from error
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_whole(folder / f"found-{what}-{processes}.json", json.dumps(found))
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    run_to_end(lambda: main(sys.argv[1], Path(sys.argv[2])))
