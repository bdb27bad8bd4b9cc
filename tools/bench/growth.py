"""How the cost grows with tokens, batch and depth: FLOPs exactly, time as measured, and the exponents of both.

    python -m tools.bench.growth                  # a narrow Sana on a CPU, 256 to 4096 tokens: a minute on two cores
    python -m tools.bench.growth --whole-step     # a generator and a discriminator update as well: some minutes
    python -m tools.bench.growth --device cuda --width 1152 --precision bf16

    pass     value and tangent of the student, then the backward pass
    update   one generator and one discriminator update of sprint.train.distill

An exponent is the slope of log cost against log size, by least squares: 1 is linear. Sana's attention over tokens is
linear, so tokens should cost 1; less is overhead that does not grow. One size is changed at a time, the others stay at
the table's first row. Times are medians of interleaved rounds. Writes tools/results/bench_growth_DEVICE.json.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

from sprint.base.errors import SprintError
from sprint.recipe.schema import Precision
from tools.bench import measure
from tools.bench.flops import Counts
from tools.bench.jvp import pass_of
from tools.bench.measure import (
    SIZES,
    Request,
    Size,
    interleaved,
    requested,
    summary,
    write_results,
)
from tools.bench.memory import Case, build

HEAD = 32  # of self-attention, in every Sana


class Point(NamedTuple):
    """What is varied. tokens must be a square."""

    tokens: int
    batch: int
    depth: int


START = Point(tokens=256, batch=2, depth=4)
AXES = {"tokens": (256, 1024, 2304, 4096), "batch": (2, 4, 8, 16), "depth": (4, 8, 16)}


def size_of(point: Point, width: int) -> Size:
    """A Sana of that depth and width. Its text is short, so that what does not grow with tokens is small."""
    config = SIZES["tiny"].config | {
        "num_layers": point.depth,
        "num_attention_heads": width // HEAD,
        "num_cross_attention_heads": max(1, width // 64),
        "cross_attention_head_dim": width // max(1, width // 64),
        "cross_attention_dim": width,
        "sample_size": math.isqrt(point.tokens),
    }
    return Size(config, taps=(point.depth - 1,), text_tokens=32, batch=point.batch)


def pass_at(point: Point, width: int, request: Request) -> Callable[[], None]:
    return pass_of("ours", registered(point, width, request))


def updates_at(point: Point, width: int, request: Request) -> Callable[[], None]:
    """One generator and one discriminator update."""
    stage, batch = build(Case(registered(point, width, request), "distill", False), traced=False)
    steps = count()
    return lambda: [stage.update(next(steps), batch) for _ in ("G", "D")]


def registered(point: Point, width: int, request: Request) -> Request:
    """A request for this network, which the other benchmarks then know by its name."""
    name = f"{width} wide, {'x'.join(map(str, point))}"
    measure.SIZES[name] = size_of(point, width)
    return request._replace(network=name, batch=point.batch)


def flops_of(run: Callable[[], object]) -> int:
    counter = Counts()
    with counter:
        run()
    return sum(each.flops for operations in counter.operations.values() for each in operations)


def exponent(sizes: list[int], costs: list[float]) -> float:
    """The slope of log cost against log size, by least squares."""
    slope, _ = statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, costs)])
    return slope


# ---- measuring --------------------------------------------------------------------------------------


def along(
    axis: str, sizes: tuple[int, ...], work: Callable, width: int, request: Request, rounds: int
) -> dict:
    """One axis of the table: time and FLOPs of `work` at every size, and their exponents."""
    runs = {size: work(START._replace(**{axis: size}), width, request) for size in sizes}
    flops = [flops_of(run) for run in runs.values()]
    seconds = interleaved({str(size): run for size, run in runs.items()}, rounds)
    medians = [statistics.median(values) for values in seconds.values()]
    return {
        "sizes": list(sizes),
        "flops": flops,
        "flops_exponent": exponent(sizes, flops),
        "seconds": [summary(values) for values in seconds.values()],
        "time_exponent": exponent(sizes, medians),
        "time_exponent_of_the_last_two": exponent(sizes[-2:], medians[-2:]),
    }


def growth(request: Request, width: int, rounds: int, whole_step: bool, largest: int | None) -> dict:
    work = {"pass": pass_at} | ({"update": updates_at} if whole_step else {})
    tables: dict[str, dict] = {}
    for name, make in work.items():
        tables[name] = {}
        for axis, sizes in AXES.items():
            kept = tuple(size for size in sizes if axis != "tokens" or not largest or size <= largest)
            tables[name][axis] = along(axis, kept, make, width, request, rounds)
    return {
        "width": width,
        "text_tokens": 32,
        "start": START._asdict(),
        "device": request.device,
        "precision": request.precision.value,
        "rounds": rounds,
    } | tables


# ---- the page ---------------------------------------------------------------------------------------


def page(results: dict) -> str:
    start = ", ".join(f"{name} {size}" for name, size in results["start"].items())
    lines = [f"width {results['width']}, {results['precision']}, {results['device']}; from {start}"]
    for name in ("pass", "update"):
        for axis, table in results.get(name, {}).items():
            lines += ["", f"{name + ', ' + axis:20}" + "".join(f"{size:>12}" for size in table["sizes"])]
            seconds = [f"{each['median']:12.4f}" for each in table["seconds"]]
            lines += [f"{'GFLOP':20}" + "".join(f"{flops / 1e9:12.2f}" for flops in table["flops"])]
            lines += [f"{'seconds':20}" + "".join(seconds)]
            lines.append(
                f"exponent: FLOPs {table['flops_exponent']:.3f}, time {table['time_exponent']:.2f}, "
                f"between the last two {table['time_exponent_of_the_last_two']:.2f}"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=128, help="channels, a multiple of 64 (default 128)")
    parser.add_argument("--largest", type=int, help="leave out token counts above this")
    parser.add_argument("--whole-step", action="store_true", help="a G and a D update as well")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=[p.value for p in Precision], default="fp32")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    args = parser.parse_args(argv)
    try:
        if args.width < 64 or args.width % 64:
            raise SprintError(f"--width {args.width}: it must be a multiple of 64")
        if args.largest is not None and args.largest < AXES["tokens"][1]:
            raise SprintError(f"--largest {args.largest}: at least two token counts are needed, 256 and 1024")
        request = requested(argparse.Namespace(**vars(args), network="tiny", batch=START.batch))
        results = growth(request, args.width, args.rounds, args.whole_step, args.largest)
    except SprintError as error:
        print(f"bench_growth: {error}", file=sys.stderr)
        return 2
    print(page(results))
    print(write_results(f"bench_growth_{args.device}", results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
