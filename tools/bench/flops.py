"""FLOPs and bytes of both updates by part, the time that they must take on this machine, and the time they take.

    python -m tools.bench.flops                       # 20M Sana, batch 8, CPU: under two minutes on two cores
    python -m tools.bench.flops --network 0.6b --precision bf16    # counts alone, without a GPU: about a minute
    python -m tools.bench.flops --network 0.6b --device cuda --precision bf16 --checkpointing

FLOPs are those of matrix products, convolutions and attention, multiplication and addition counted apart. Bytes are
what every operation reads and writes, as if nothing stayed in a cache. Two speeds are measured in the same run:
the fastest product (square, and of the step's own shapes), and a large copy. Then, by part,

    compute   FLOPs / product speed: no program is faster; its share of the time is the MFU
    floor     the sum over operations of the larger of FLOPs / product speed and bytes / copy speed: the step as it is
              cut into operations; less only by fusing them, or where tensors fit a cache

Writes tools/results/bench_flops_NETWORK_DEVICE.json.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from sprint.base.clock import OTHER, Clock
from sprint.base.errors import SprintError
from sprint.base.products import float32_products
from sprint.recipe.schema import Precision
from tools.bench.measure import (
    SIZES,
    Request,
    add_request,
    interleaved,
    requested,
    summary,
    write_results,
)
from tools.bench.memory import Case, build, without_memory

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
COPY_BYTES = 256 * 2**20
GOAL_MFU = 0.45  # bf16 on an H100

Operations = list[tuple[int, int]]  # FLOPs and bytes of each


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
        self.operations[self._part].append((flops, sum(map(tensor_bytes, tensors))))
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


def product_speeds(request: Request, rounds: int) -> dict[str, float]:
    """FLOPs per second: of a square product, and of the projections and convolutions that the step is made of."""
    size, device = SIZES[request.network], request.device
    dtype = torch.bfloat16 if request.precision is Precision.bf16 else torch.float32
    width = size.config["num_attention_heads"] * size.config["attention_head_dim"]
    side, batch, inner = size.config["sample_size"], request.batch, int(2.5 * width)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    n, rows = 1024 if device == "cpu" else 8192, batch * side**2
    multiply = float32_products()
    square, x, weight = new(n, n), new(batch, side**2, width), new(width, width)
    picture, wide = new(batch, width, side, side), new(2 * inner, width, 1, 1)
    last = picture.to(memory_format=torch.channels_last)
    ring, nine = last.flatten(2).unsqueeze(2), new(width, width, 1, 9)  # as a head sees its tokens
    products = {
        f"{n}×{n} by {n}×{n}": (lambda: multiply(square, square), 2 * n**3),
        f"projection {rows}×{width} by {width}×{width}": (lambda: multiply(x, weight), 2 * rows * width**2),
        f"1×1 convolution {width} to {2 * inner}": (
            lambda: nnf.conv2d(picture, wide),
            4 * rows * width * inner,
        ),
        "the same, channels last": (lambda: nnf.conv2d(last, wide), 4 * rows * width * inner),
        "9 tokens wide convolution, channels last": (
            lambda: nnf.conv2d(ring, nine),
            18 * (rows - 8 * batch) * width**2,
        ),
    }
    with torch.no_grad():
        seconds = interleaved({name: run for name, (run, _) in products.items()}, rounds, warmup=2)
    return {name: flops / min(seconds[name]) for name, (_, flops) in products.items()}


def copy_speed(device: str, rounds: int) -> float:
    """Bytes read and written per second by a copy too large for any cache."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / min(interleaved({"copy": lambda: target.copy_(source)}, rounds)["copy"])


def times_of(case: Case, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every timed update by phase and part; two rounds of warm-up are not among them."""
    stage, batch = build(case, traced=False)
    clock = Clock(torch.device(case.request.device))
    seconds: dict[str, dict[str, list[float]]] = {phase: defaultdict(list) for phase in PHASES}
    for step in tqdm(range(2 * (rounds + 2)), desc="updates", leave=False):
        phase = PHASES[step % 2]
        stage.clock = Labelled(clock, phase)
        clock.restart()
        stage.update(step, batch)
        for part, milliseconds in clock.read().items():
            if step >= 4:
                seconds[phase][part].append(milliseconds / 1000)
    return seconds


def table_of(
    counts: dict[str, Operations], speeds: tuple[float, float] | None, seconds: dict[str, list[float]] | None
) -> dict[str, dict]:
    """One phase: by part and in all, counts, floors in seconds, times, and the share of the time that each floor is."""
    parts = {**counts, "all": [each for operations in counts.values() for each in operations]}
    table = {}
    for name, operations in parts.items():
        flops, moved = (sum(column) for column in zip(*operations, strict=True))
        row = {"flops": flops, "bytes": moved, "operations": len(operations)}
        if speeds:
            product, copy = speeds
            row["compute_seconds"] = flops / product
            row["floor_seconds"] = sum(max(f / product, b / copy) for f, b in operations)
        if seconds:
            rounds = zip(*seconds.values(), strict=True) if name == "all" else None
            row["seconds"] = summary([sum(each) for each in rounds] if rounds else seconds[name])
            median = row["seconds"]["median"]
            row["mfu"] = row["compute_seconds"] / median
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
    products, copy = product_speeds(request, rounds), copy_speed(request.device, rounds)
    seconds = times_of(case, rounds)
    again = product_speeds(request, rounds)  # a machine's speed drifts: the mean of before and after
    speeds = {name: statistics.mean((products[name], again[name])) for name in products}
    best = (max(speeds.values()), copy)
    results |= {"flops_per_second": speeds, "copied_bytes_per_second": copy}
    return results | {phase: table_of(counts[phase], best, seconds[phase]) for phase in PHASES}


# ---- the page ---------------------------------------------------------------------------------------


def page(results: dict) -> str:
    lines = [
        f"{results['network']}, batch {results['batch']}, {results['precision']}, {results['device']}"
        + (", activations recomputed" if results["activation_checkpointing"] else "")
    ]
    for name, speed in results.get("flops_per_second", {}).items():
        lines.append(f"{name:48}{speed / 1e9:10.1f} GFLOP/s")
    if "copied_bytes_per_second" in results:
        lines.append(f"{'copy, read and written':48}{results['copied_bytes_per_second'] / 1e9:10.1f} GB/s")
    for phase in PHASES:
        lines += ["", _heading(phase, "floor_seconds" in results[phase]["all"])]
        lines += [_line(name, row) for name, row in results[phase].items()]
    return "\n".join(lines)


def _heading(phase: str, timed: bool) -> str:
    heading = f"{phase + ' update':28}{'GFLOP':>11}{'GB':>11}{'ops':>8}"
    return (
        heading + f"{'compute s':>11}{'floor s':>9}{'s':>9}{'MFU':>7}{'of floor':>10}" if timed else heading
    )


def _line(name: str, row: dict) -> str:
    line = f"{name:28}{row['flops'] / 1e9:11.2f}{row['bytes'] / 1e9:11.3f}{row['operations']:8}"
    if "seconds" not in row:
        return line
    line += f"{row['compute_seconds']:11.4f}{row['floor_seconds']:9.4f}{row['seconds']['median']:9.4f}"
    return line + f"{row['mfu']:7.0%}{row['share_of_floor_reached']:10.0%}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_request(parser)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    args = parser.parse_args(argv)
    try:
        request = requested(args)
        if request.batch < 2:
            raise SprintError("--batch must be at least 2: misaligned pairs need a neighbour")
        results = measure(request, args.checkpointing, args.rounds)
    except SprintError as error:
        print(f"bench_flops: {error}", file=sys.stderr)
        return 2
    print(page(results))
    print(write_results(f"bench_flops_{args.network}_{args.device}", results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
