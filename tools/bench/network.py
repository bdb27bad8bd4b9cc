"""One plain forward and backward of the network: diffusers' own against ours, time, values and gradients.

    python -m tools.bench.network                       # 20M Sana, batch 8, CPU
    python -m tools.bench.network --network tiny        # the built-in family's, with its recipe's batch and text
    python -m tools.bench.network --compile             # compiled blocks as well: minutes more
    python -m tools.bench.network --network 0.6b --device cuda --precision bf16 --compile

    plain                 diffusers' network as it is, eager, with the products that pip's torch gives
    plain, same products  the same with the matrix products of ours (tools/bench/variants.py)
    ours                  as the trainer's engine lays it out, products=exact
    ours, fastest         products=fastest; on a CPU that multiplies bf16 faster
    ours, compiled        products=fastest, blocks compiled as the trainer compiles them, for --compile

A student with random weights, a mean of squares for a loss; no tangent (that is tools/bench/jvp.py). Beside the times
stands how far F and the gradient of all weights lie from plain's, ‖a - b‖/‖b‖. Same products round alike: where ours
lies farther from plain than twice what the plain network with its products does, or than what 100 roundings of the
precision make, the fast path is wrong, the page says so and the exit status is 1.
Times are medians of interleaved rounds, with freed memory kept as a run keeps it.
Writes tools/results/bench_network_NETWORK_DEVICE.json.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sprint.base.cpu import keep_freed_memory
from sprint.base.errors import SprintError
from sprint.engine.compiled import compile_blocks
from sprint.engine.engine import keep_time_in_float32
from sprint.models.student import Student, from_adapted
from sprint.recipe.schema import Precision
from tools.bench.jvp import inputs_of
from tools.bench.measure import (
    SIZES,
    Request,
    add_request,
    interleaved,
    ratio,
    requested,
    summary,
    write_results,
)
from tools.bench.variants import PLAIN, Variant, rivals_of, variants_of

ROUNDINGS = 100  # of the precision, that values and gradients may lie apart without being wrong
TIMES = 2  # as far from plain as the rival


class Outcome(NamedTuple):
    """F [B, C, H, W] and the gradient of every weight, on the device."""

    value: Tensor
    gradient: list[Tensor]


def pass_of(variant: Variant, request: Request) -> Callable[[], Outcome]:
    """One forward of the variant and its backward, on a student of its own."""
    size, engine = SIZES[request.network], variant.engine(request)
    student = Student(from_adapted(size.teacher(engine.device))).to(engine.device).train()
    variant.hasten(engine, student)
    if request.precision is Precision.bf16:
        keep_time_in_float32(student)
    if variant.compiled:
        compile_blocks(student.network)
    data, t, guidance = inputs_of(size, request.batch, engine.device)
    weights = [*student.network.parameters()]

    def run() -> Outcome:
        student.zero_grad(set_to_none=True)
        with engine.autocast():
            F = student(data.latent, t, data.text, data.mask, guidance)
            loss = F.square().mean()
        loss.backward()
        return Outcome(F.detach(), [p.grad for p in weights])

    return run


# ---- measuring --------------------------------------------------------------------------------------


def distance(a: Outcome, b: Outcome) -> dict[str, float]:
    """‖a - b‖/‖b‖ of values, and of all gradients in one row."""

    def apart(x: list[Tensor], y: list[Tensor]) -> float:
        off = torch.stack([(a - b).double().norm() for a, b in zip(x, y, strict=True)]).norm()
        return float(off / torch.stack([b.double().norm() for b in y]).norm())

    return {"value": apart([a.value], [b.value]), "gradient": apart(a.gradient, b.gradient)}


def is_wrong(ours: dict[str, float], rival: dict[str, float], precision: Precision) -> bool:
    """Whether ours lies farther from plain than rounding explains.

    ours, rival   distances from plain
    """
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    least = ROUNDINGS * torch.finfo(dtype).eps
    return any(not ours[part] <= max(least, TIMES * rival[part]) for part in ours)


def measure(request: Request, compiled: bool, rounds: int) -> dict:
    keep_freed_memory()
    variants = variants_of(request.device, compiled)
    runs = {each.name: pass_of(each, request) for each in variants}
    exact = runs[PLAIN.name]()
    distances = {name: distance(run(), exact) for name, run in runs.items()}
    rivals = {
        each.name: [rival.name for rival in rivals_of(each, variants, request.device)]
        for each in variants
        if each.ours
    }
    seconds = interleaved(runs, rounds, warmup=1)
    return {
        **request.record(),
        "rounds": rounds,
        "multiplied_by": {each.name: each.multiply().__name__ for each in variants},
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "speed_ratio": {
            name: {rival: ratio(seconds[rival], seconds[name]) for rival in found}
            for name, found in rivals.items()
        },
        "distance_from_plain": distances,
        "wrong": [
            name
            for name, found in rivals.items()
            if is_wrong(distances[name], distances[found[-1]], request.precision)
        ],
    }


# ---- the page ---------------------------------------------------------------------------------------


def page(results: dict) -> str:
    lines = [
        f"{results['network']}, batch {results['batch']}, {results['precision']}, {results['device']}; "
        f"medians of {results['rounds']} rounds",
        f"{'':26}{'seconds':>10}{'values':>12}{'gradients':>12}   (distance from {PLAIN.name})",
    ]
    for name, seconds in results["seconds"].items():
        apart = results["distance_from_plain"][name]
        wrong = "  WRONG" * (name in results["wrong"])
        lines.append(
            f"{name:26}{seconds['median']:10.4f}{apart['value']:12.1e}{apart['gradient']:12.1e}{wrong}"
        )
    lines.append("")
    for name, rivals in results["speed_ratio"].items():
        for rival, speed in rivals.items():
            spread = f"({speed['min']:.2f}-{speed['max']:.2f})"
            lines.append(f"speed, {name} over {rival}: {speed['median']:.2f} {spread}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_request(parser)
    parser.add_argument("--compile", action="store_true", help="measure the compiled variant as well")
    args = parser.parse_args(argv)
    try:
        results = measure(requested(args), args.compile, args.rounds)
    except (SprintError, torch.OutOfMemoryError) as error:
        print(f"bench_network: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(page(results))
    print(write_results(f"bench_network_{args.network}_{args.device}", results))
    return 1 if results["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
