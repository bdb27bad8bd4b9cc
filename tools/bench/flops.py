"""FLOPs and bytes of both updates by part, the time that they must take on this machine, and the time they take.

    python -m tools.bench.flops                       # 20M Sana, batch 8, CPU: some minutes on two cores
    python -m tools.bench.flops --products fastest    # where blocks multiply bf16 factors
    python -m tools.bench.flops --network 0.6b --precision bf16    # counts alone, without a GPU: about a minute
    python -m tools.bench.flops --network 0.6b --device cuda --precision bf16 --checkpointing

FLOPs are those of matrix products, convolutions and attention, multiplication and addition counted apart. Bytes are
what every operation reads and writes, as if nothing stayed in a cache. Speeds are measured in the same run: the
fastest product of every dtype that is multiplied (square, and of the step's own shapes), and a large copy. By part,

    compute   FLOPs / product speed of their dtype: no program is faster; its share of the time is the MFU
    moved     bytes / copy speed
    floor     the sum over operations of the larger of the two: the step as it is cut into operations; less only by
              fusing them, or where tensors fit a cache

What eats the rest is told by the operators that take most of an update by themselves, and by the time between them
(torch's profiler, one update of each phase). Writes tools/results/bench_flops_NETWORK_DEVICE.json
(NETWORK_DEVICE_fastest.json with --products fastest).
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from sprint.base.clock import OTHER, Clock
from sprint.base.cpu import keep_freed_memory
from sprint.base.errors import SprintError
from sprint.data.batch import Batch
from sprint.recipe.schema import Products
from sprint.train.distill import DistillStage
from tools.bench.measure import Request, add_request, requested, summary, write_results
from tools.bench.memory import Case, build, without_memory
from tools.bench.operators import operators_of
from tools.bench.peaks import copy_speed, product_speeds

PARTS = {  # of the stage's clock, by name and place in the update: what is at work there
    "G": {
        ("teacher", 0): "teacher, guided",
        ("student", 0): "student, value and tangent",
        ("backward", 0): "backward of sCM",
        ("features", 0): "features of data",
        ("student", 1): "student, one-step sample",
        ("features", 1): "features of the sample",
        ("heads", 0): "heads",
        ("backward", 1): "backward of LADD",
        ("optimizer", 0): "optimizer",
    },
    "D": {
        ("student", 0): "student, one-step sample",
        ("features", 0): "features, three kinds",
        ("heads", 0): "heads",
        ("backward", 0): "backward of the heads",
        ("optimizer", 0): "optimizer",
    },
}
PHASES = tuple(PARTS)
WARM_UP = 2  # rounds


class Operation(NamedTuple):
    """bytes: read and written; dtype: of the first tensor that goes in, by name"""

    flops: int
    bytes: int
    dtype: str = "float32"


class Speeds(NamedTuple):
    """FLOPs per second of products by dtype, bytes per second of a copy."""

    products: dict[str, float]
    copy: float

    def compute(self, operation: Operation) -> float:
        """Seconds that its products take at least."""
        return operation.flops / self.products[operation.dtype] if operation.flops else 0.0

    def moved(self, operation: Operation) -> float:
        """Seconds that its reading and writing takes at least."""
        return operation.bytes / self.copy


Operations = list[Operation]


# ---- counting ---------------------------------------------------------------------------------------


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *options) -> int:
    """Each gradient asked for costs what the forward does (torch's own count forgets the groups)."""
    *_, output_mask = options
    return sum(output_mask[:2]) * 2 * grad.numel() * weight[0].numel()


def attention(query: Tensor, key: Tensor, value: Tensor, *options) -> int:
    """Two products of every query with every key."""
    return 4 * query.numel() * key.shape[-2]


def attention_backward(grad: Tensor, query: Tensor, key: Tensor, *options) -> int:
    """Five: the fused kernel computes the scores again."""
    return 10 * query.numel() * key.shape[-2]


aten = torch.ops.aten
FLOPS: dict[object, Callable[..., int]] = {  # by operator: of what it gave and its arguments
    aten.mm: lambda out, a, b: 2 * out.numel() * a.shape[-1],
    aten.bmm: lambda out, a, b: 2 * out.numel() * a.shape[-1],
    aten.mv: lambda out, a, b: 2 * a.numel(),
    aten.dot: lambda out, a, b: 2 * a.numel(),
    aten.addmm: lambda out, c, a, b: 2 * out.numel() * a.shape[-1],
    aten.addmv: lambda out, c, a, b: 2 * a.numel(),
    aten.baddbmm: lambda out, c, a, b: 2 * out.numel() * a.shape[-1],
    aten.convolution: lambda out, x, weight, *options: 2 * out.numel() * weight[0].numel(),
    aten.convolution_backward: lambda out, *args: convolution_backward(*args),
    torch.ops.sprint.onednn_linear: lambda out, x, *rest: 2 * out.numel() * x.shape[-1],
    torch.ops.sprint.depthwise: lambda out, x, weight, *rest: 2 * out.numel() * weight[0].numel(),
    torch.ops.sprint.depthwise_backward: lambda out, grad, x, weight, for_x, for_weight: (
        2 * grad.numel() * weight[0].numel() * (for_x + for_weight)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda out, *args: attention(*args),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda out, *args: attention_backward(*args),
    aten._scaled_dot_product_flash_attention: lambda out, *args: attention(*args),
    aten._scaled_dot_product_flash_attention_backward: lambda out, *args: attention_backward(*args),
    aten._scaled_dot_product_efficient_attention: lambda out, *args: attention(*args),
    aten._scaled_dot_product_efficient_attention_backward: lambda out, *args: attention_backward(*args),
    aten._scaled_dot_product_cudnn_attention: lambda out, *args: attention(*args),
    aten._scaled_dot_product_cudnn_attention_backward: lambda out, *args: attention_backward(*args),
}

if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # what sprint.base.products takes without gradients
    FLOPS[torch.ops.mkldnn._linear_pointwise] = FLOPS[torch.ops.sprint.onednn_linear]


def moves_nothing(function) -> bool:
    """Views, and new tensors that nothing is written to."""
    aliases = [each.alias_info for each in function._schema.returns]
    view = any(alias is not None and not alias.is_write for alias in aliases)
    return view or "empty" in function._schema.name


def tensor_bytes(tensor: Tensor) -> int:
    """What is there: an expanded tensor is no larger than what it was expanded from."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


class Counts(TorchDispatchMode):
    """FLOPs and bytes of every operation inside, by part of the clock that it stands in for."""

    def __init__(self):
        super().__init__()
        self._part = OTHER
        self.restart()

    def restart(self) -> None:
        self.operations: dict[str, Operations] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._part = name
        try:
            yield
        finally:
            self._part = OTHER

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if moves_nothing(function):
            return out
        formula = FLOPS.get(function.overloadpacket)
        if formula is None and function.overloadpacket in flop_registry:
            raise NotImplementedError(f"no formula for the FLOPs of {function}; add one to FLOPS")
        flops = formula(out[0] if isinstance(out, tuple) else out, *args) if formula else 0
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        self.operations[self._part].append(Operation(flops, sum(map(tensor_bytes, tensors)), dtype))
        return out


class Labelled:
    """A clock whose parts are told apart by their place in the update, under the names of PARTS."""

    def __init__(self, clock: Clock | Counts, phase: str):
        self.clock, self.names, self.seen = clock, PARTS[phase], defaultdict(int)

    def part(self, name: str):
        place = self.seen[name]
        self.seen[name] += 1
        return self.clock.part(self.names[name, place])


def counts_of(case: Case, traced: bool) -> dict[str, dict[str, Operations]]:
    """Operations of a second update by phase and part; the first makes the optimizer's state."""
    with without_memory() if traced else nullcontext():
        stage, batch = build(case, traced)
        counts: dict[str, dict[str, Operations]] = {}
        for step in tqdm(range(4), desc="counting", leave=False):
            phase, counter = PHASES[step % 2], Counts()
            stage.clock = Labelled(counter, phase)
            with counter:
                stage.update(step, batch)
            counts[phase] = dict(counter.operations)
    return counts


# ---- measuring --------------------------------------------------------------------------------------


def times_of(stage: DistillStage, batch: Batch, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every timed update by phase and part; the rounds of warm-up are not among them."""
    clock = Clock(stage.engine.device)
    seconds: dict[str, dict[str, list[float]]] = {phase: defaultdict(list) for phase in PHASES}
    for step in tqdm(range(2 * (rounds + WARM_UP)), desc="updates", leave=False):
        phase = PHASES[step % 2]
        stage.clock = Labelled(clock, phase)
        clock.restart()
        stage.update(step, batch)
        for part, milliseconds in clock.read().items():
            if step >= 2 * WARM_UP:
                seconds[phase][part].append(milliseconds / 1000)
    return seconds


def profiles_of(stage: DistillStage, batch: Batch) -> dict[str, dict]:
    """What takes the time of one update of each phase; the stage has made such updates before."""
    stage.clock = Clock(stage.engine.device)
    return {
        phase: operators_of(lambda step=step: stage.update(step, batch), stage.engine.device)
        for step, phase in enumerate(PHASES)
    }


def dtypes_multiplied(counts: dict[str, dict[str, Operations]]) -> list[str]:
    """In which products are made."""
    everything = [each for parts in counts.values() for operations in parts.values() for each in operations]
    return sorted({each.dtype for each in everything if each.flops})


def table_of(
    counts: dict[str, Operations], speeds: Speeds | None, seconds: dict[str, list[float]] | None
) -> dict[str, dict]:
    """One phase: by part and in all, counts, floors in seconds, times, and the share of the time that each floor is."""
    parts = {**counts, "all": [each for operations in counts.values() for each in operations]}
    table = {}
    for name, operations in parts.items():
        row = {
            "flops": sum(each.flops for each in operations),
            "bytes": sum(each.bytes for each in operations),
            "operations": len(operations),
        }
        if speeds:
            row["compute_seconds"] = sum(map(speeds.compute, operations))
            row["moved_seconds"] = sum(map(speeds.moved, operations))
            row["floor_seconds"] = sum(max(speeds.compute(each), speeds.moved(each)) for each in operations)
        if seconds:
            rounds = zip(*seconds.values(), strict=True) if name == "all" else None
            row["seconds"] = summary([sum(each) for each in rounds] if rounds else seconds[name])
            median = row["seconds"]["median"]
            row["mfu"] = row["compute_seconds"] / median
            row["share_of_bandwidth"] = row["moved_seconds"] / median
            row["share_of_floor_reached"] = row["floor_seconds"] / median
        table[name] = row
    return table


def measure(request: Request, checkpointing: bool, rounds: int) -> dict:
    case = Case(request, "distill", checkpointing)
    only_counts = request.network == "0.6b" and request.device == "cpu"
    counts = counts_of(case, traced=only_counts)
    results = {
        **request.record(),
        "activation_checkpointing": checkpointing,
        "rounds": rounds,
    }
    if only_counts:
        return results | {phase: table_of(counts[phase], None, None) for phase in PHASES}
    keep_freed_memory()
    dtypes = dtypes_multiplied(counts)
    before = {dtype: product_speeds(request, dtype, rounds) for dtype in dtypes}
    copy = copy_speed(request.device, rounds)
    stage, batch = build(case, traced=False)
    results["multiplied_by"] = stage.engine.multiply.__name__
    seconds = times_of(stage, batch, rounds)
    profiles = profiles_of(stage, batch)
    products = {}  # a machine's speed drifts: the mean of before and after
    for dtype in dtypes:
        after = product_speeds(request, dtype, rounds)
        products[dtype] = {
            name: statistics.mean((speed, after[name])) for name, speed in before[dtype].items()
        }
    speeds = Speeds({dtype: max(found.values()) for dtype, found in products.items()}, copy)
    results |= {"flops_per_second": products, "copied_bytes_per_second": copy}
    results |= {phase: table_of(counts[phase], speeds, seconds[phase]) for phase in PHASES}
    return results | {"profile": profiles}


# ---- the page ---------------------------------------------------------------------------------------


def page(results: dict) -> str:
    multiplied = f"blocks multiply by {results['multiplied_by']}, " if "multiplied_by" in results else ""
    recomputed = ", activations recomputed" * results["activation_checkpointing"]
    lines = [
        f"{results['network']}, batch {results['batch']}, {results['precision']}, "
        f"{multiplied}{results['device']}{recomputed}"
    ]
    for dtype, speeds in results.get("flops_per_second", {}).items():
        for name, speed in speeds.items():
            lines.append(f"{dtype + ', ' + name:58}{speed / 1e9:10.1f} GFLOP/s")
    if "copied_bytes_per_second" in results:
        lines.append(f"{'copy, read and written':58}{results['copied_bytes_per_second'] / 1e9:10.1f} GB/s")
    for phase in PHASES:
        lines += ["", _heading(phase, "floor_seconds" in results[phase]["all"])]
        lines += [_line(name, row) for name, row in results[phase].items()]
    for phase, profile in results.get("profile", {}).items():
        lines += ["", f"{phase + ' update, by operator':58}{'of time':>10}{'s':>9}{'calls':>8}"]
        lines += [
            f"{each['operator'][:56]:58}{each['share']:10.1%}{each['seconds']:9.4f}{each['calls']:8}"
            for each in profile["operators"]
        ]
    return "\n".join(lines)


def _heading(phase: str, timed: bool) -> str:
    heading = f"{phase + ' update':28}{'GFLOP':>11}{'GB':>11}{'ops':>8}"
    times = f"{'compute s':>11}{'moved s':>9}{'floor s':>9}{'s':>9}{'MFU':>7}{'of floor':>10}"
    return heading + times if timed else heading


def _line(name: str, row: dict) -> str:
    line = f"{name:28}{row['flops'] / 1e9:11.2f}{row['bytes'] / 1e9:11.3f}{row['operations']:8}"
    if "seconds" not in row:
        return line
    line += f"{row['compute_seconds']:11.4f}{row['moved_seconds']:9.4f}{row['floor_seconds']:9.4f}"
    line += f"{row['seconds']['median']:9.4f}"
    return line + f"{row['mfu']:7.0%}{row['share_of_floor_reached']:10.0%}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_request(parser)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--products", choices=[each.value for each in Products], default="exact")
    args = parser.parse_args(argv)
    try:
        request = requested(args)._replace(products=Products(args.products))
        if request.batch < 2:
            raise SprintError("--batch must be at least 2: misaligned pairs need a neighbour")
        results = measure(request, args.checkpointing, args.rounds)
    except SprintError as error:
        print(f"bench_flops: {error}", file=sys.stderr)
        return 2
    print(page(results))
    ending = "_fastest" if request.products is Products.fastest else ""
    print(write_results(f"bench_flops_{args.network}_{args.device}{ending}", results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
