"""The memory plan of --dry-run against what whole updates hold, for both stages, with and without checkpointing.

    python -m tools.bench.memory                            # tiny and 20M: about a minute on two cores
    python -m tools.bench.memory --network 0.6b --micro-batch 0 16      # batch 32, 1024 px: two minutes, no GPU
    python -m tools.bench.memory --network 0.6b --device cuda           # measured

On a CPU the bytes of all live tensors are counted, storage by storage, at every operation: exact, the same every
time, blind to what an allocator adds. Networks larger than tiny are traced: every operation of the real step is
there, on tensors without memory; tests show that both give the same count. On CUDA it is what the allocator handed out
(`max_memory_allocated`). Each figure is the highest point of a second round of updates, when gradients and
optimizer state exist. Writes tools/results/bench_memory_NETWORK_DEVICE.json.
"""

import argparse
import gc
import os
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import NamedTuple
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from sprint.base.errors import SprintError
from sprint.data.batch import Batch
from sprint.engine.engine import Engine, keep_time_in_float32
from sprint.models.sana.family import Sana
from sprint.recipe.schema import (
    Adapt,
    Adversarial,
    Distill,
    Precision,
    Recipe,
    Text,
)
from sprint.train.adapt import AdaptStage
from sprint.train.distill import DistillStage
from sprint.train.plan.networks import networks_of
from sprint.train.plan.plan import adapt_memory, distill_memory, with_totals
from tools.bench.measure import SIZES, Request, in_fresh_process, write_results

GOAL = 20e9  # bytes: 0.6B, batch 32, 1024 px; what the paper says it takes
STAGES = ("adapt", "distill")


class Case(NamedTuple):
    """One row: a stage of a network on a device.

    micro_batch   pictures in one forward, 0 for all
    depth         blocks of the student, 0 for as many as its teacher has
    """

    request: Request
    stage: str
    checkpointing: bool
    micro_batch: int = 0
    depth: int = 0


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside that are alive, each storage once; stands in for a stage's clock.

    now, peak   bytes; set `peak` to `now` to begin again
    by_part     the peak within each part of the clock since `restart`
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}
        self._part = "other"
        self.restart()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return out

    def note(self, tensor: Tensor) -> None:
        """Count a tensor from now on until its storage is freed; those that operations return come by themselves."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = weakref.ref(storage, partial(self._freed, key, size))
        self.now += size
        self.peak = max(self.peak, self.now)
        self.by_part[self._part] = max(self.by_part.get(self._part, 0), self.now)

    def _freed(self, key: int, size: int, reference: weakref.ref) -> None:
        del self._alive[key]
        self.now -= size

    def restart(self) -> None:
        self.by_part: dict[str, int] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._part = name
        self.by_part[name] = max(self.by_part.get(name, 0), self.now)
        try:
            yield
        finally:
            self._part = "other"


# ---- the step ---------------------------------------------------------------------------------------


class TracedEngine(Engine):
    """For tensors without memory: casts what is frozen without `Module.to`."""

    def frozen(self, network: SanaTransformer2DModel) -> SanaTransformer2DModel:
        network.eval().requires_grad_(False)
        self.hasten(network)
        if self.precision is Precision.bf16:
            exact = set(network.time_embed.modules())
            for part in network.modules():
                for name, p in () if part in exact else part.named_parameters(recurse=False):
                    part.register_parameter(name, nn.Parameter(p.to(torch.bfloat16), requires_grad=False))
            keep_time_in_float32(network)
        return network


@contextmanager
def without_memory() -> Iterator[None]:
    """Inside, new tensors have shape and dtype and no memory; data that exists may take part.

    `Module.to` cannot make others of them in place, and leaves modules as they are: on the CPU in float32.
    """
    stay = patch.object(nn.Module, "to", lambda module, *args, **kwargs: module)
    with stay, warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        # of the text memory
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


def recipe_of(case: Case) -> Recipe:
    """The paper's settings; only what the case asks for differs."""
    request, size = case.request, SIZES[case.request.network]
    return Recipe(
        name="bench",
        precision=request.precision,
        activation_checkpointing=case.checkpointing,
        micro_batch_size=case.micro_batch,
        text=Text(max_length=size.text_tokens),
        adapt=Adapt(batch_size=request.batch),
        distill=Distill(batch_size=request.batch, depth=case.depth, adversarial=Adversarial(taps=size.taps)),
    )


def build(case: Case, traced: bool) -> tuple[AdaptStage | DistillStage, Batch]:
    """The stage with a random network, and a batch of random numbers for it."""
    request = case.request
    if request.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    engine = (TracedEngine if traced else Engine)(request.precision, products=request.products)
    size, recipe = SIZES[request.network], recipe_of(case)
    teacher, null = size.teacher(engine.device), size.text(1, engine.device)
    batch = size.batch_of(request.batch, engine.device)
    if case.stage == "adapt":
        return AdaptStage(recipe, engine, teacher, null), batch
    return DistillStage(recipe, engine, teacher, null, size.latent), batch


def updates_of(case: Case) -> tuple[str, ...]:
    return ("flow",) if case.stage == "adapt" else ("G", "D")


# ---- measured and planned ---------------------------------------------------------------------------


def counted(case: Case, traced: bool) -> dict[str, dict[str, int]]:
    """Peak bytes of the second round by update, and by part within each: live tensors on a CPU, or traced."""
    with without_memory() if traced else warnings.catch_warnings(), LiveBytes() as live:
        stage, batch = build(case, traced)
        stage.clock = live
        names = updates_of(case)
        peaks: dict[str, dict[str, int]] = {}
        for step in range(2 * len(names)):
            gc.collect()
            live.restart()
            live.peak = live.now
            stage.update(step, batch)
            peaks[names[step % len(names)]] = {"peak": live.peak} | live.by_part
    return peaks


def allocated(case: Case) -> dict[str, dict[str, int]]:
    """The same on CUDA, as its allocator saw it; without parts."""
    stage, batch = build(case, traced=False)
    names, peaks = updates_of(case), {}
    for step in range(2 * len(names)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        stage.update(step, batch)
        torch.cuda.synchronize()
        peaks[names[step % len(names)]] = {"peak": torch.cuda.max_memory_allocated()}
    return peaks


def planned(case: Case) -> int:
    """What --dry-run would print as the total for one GPU."""
    size, recipe = SIZES[case.request.network], recipe_of(case)
    tokens = (size.config["sample_size"] // size.config["patch_size"]) ** 2
    networks = networks_of(Sana(), size.config | {"qk_norm": None}, len(size.taps), tokens, case.depth)
    memory = (adapt_memory if case.stage == "adapt" else distill_memory)(recipe, networks, gpus=1)
    return round(with_totals(memory)["total, recomputed" if case.checkpointing else "total"])


def row(case: Case) -> dict:
    """A case as it is written down; without a peak where the device's memory does not suffice."""
    traced, updates = case.request.network != "tiny", {}
    if case.request.device == "cpu":
        updates, how = counted(case, traced), "traced" if traced else "counted"
    else:
        try:
            updates, how = in_fresh_process(allocated, case), "measured"
        except torch.OutOfMemoryError:
            how = "out of memory"
    plan, peak = planned(case), max((update["peak"] for update in updates.values()), default=None)
    return {
        "network": case.request.network,
        "batch": case.request.batch,
        "in_one_forward": case.micro_batch or case.request.batch,
        "stage": case.stage,
        "precision": case.request.precision.value,
        "activation_checkpointing": case.checkpointing,
        "planned_bytes": plan,
        "how": how,
        "peak_bytes": peak,
        "planned_over_peak": peak and plan / peak,
        "updates": updates,
    }


def cases(networks: list[str], device: str, batch: int | None, micro_batches: list[int]) -> list[Case]:
    """Both stages, both precisions, with and without checkpointing; of 0.6B stage 2 in bf16 only."""
    made = []
    for name in networks:
        large = name == "0.6b"
        for stage, precision in product(STAGES[large:], [Precision.bf16] if large else Precision):
            request = Request(name, batch or SIZES[name].batch, device, precision)
            made += [Case(request, stage, on, micro) for micro in micro_batches for on in (False, True)]
    return made


# ---- the page ---------------------------------------------------------------------------------------


def page(rows: list[dict]) -> str:
    lines = [
        f"{'network':9}{'stage':9}{'precision':10}{'batch':>6}{'at once':>8}{'recomputed':>11}"
        f"{'plan MB':>10}{'MB':>10}{'plan/it':>9}  how; by update"
    ]
    for each in rows:
        updates = ", ".join(f"{name} {peak['peak'] / 1e6:.0f}" for name, peak in each["updates"].items())
        peak = each["peak_bytes"]
        measured = f"{peak / 1e6:10.0f}{each['planned_over_peak']:9.3f}" if peak else " " * 19
        lines.append(
            f"{each['network']:9}{each['stage']:9}{each['precision']:10}{each['batch']:6}"
            f"{each['in_one_forward']:8}{'yes' if each['activation_checkpointing'] else 'no':>11}"
            f"{each['planned_bytes'] / 1e6:10.0f}{measured}  {each['how']}; {updates}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=SIZES, nargs="+", default=["tiny", "20m"], help="(tiny and 20m)")
    parser.add_argument("--batch", type=int, help="pictures (default: 32; 8 for 20m)")
    parser.add_argument(
        "--micro-batch", type=int, nargs="+", default=[0], help="of them in one forward (default 0: all)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    try:
        sizes = [*args.micro_batch, 2 if args.batch is None else args.batch]
        if any(size < 0 or size == 1 for size in sizes) or args.batch == 0:
            raise SprintError("--batch must be at least 2, --micro-batch 0 or at least 2 (misaligned pairs)")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise SprintError("--device cuda: there is no CUDA device here")
        planned_cases = cases(args.network, args.device, args.batch, args.micro_batch)
        rows = [row(case) for case in tqdm(planned_cases, desc="updates", leave=False)]
    except SprintError as error:
        print(f"bench_memory: {error}", file=sys.stderr)
        return 2
    print(page(rows))
    results = {"goal_bytes_0.6b_batch_32": GOAL, "rows": rows}
    print(write_results(f"bench_memory_{'_'.join(args.network)}_{args.device}", results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
