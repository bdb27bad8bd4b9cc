"""Value, tangent and gradient against a plain forward and backward: time and peak memory, as ratios.

    python -m tools.bench.jvp                     # 20M Sana, batch 8, CPU: about two minutes on two cores
    python -m tools.bench.jvp --compile           # compiled blocks too: some minutes more
    python -m tools.bench.jvp --network 0.6b --device cuda --precision bf16 --compile

    plain         F(x, t) of diffusers' network as it is, then the backward pass: forward 1 + backward 2
    two passes    torch.func.jvp without gradients, then plain: at least 2 more than plain's 3
    ours          sprint.maths.dual.value_and_tangent, then the backward pass: 1 more, so the floor is 4/3
    as trained    ours as the trainer's engine lays networks out and multiplies (sprint/base/products.py)
    compiled      ours as trained and plain, blocks through torch.compile

The networks are random. Times are medians of interleaved rounds, with freed memory kept as a run keeps it;
memory is the highest point of one call above the weights, each in a process of its own.
Writes tools/results/bench_jvp_NETWORK_DEVICE.json.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from sprint.base.cpu import keep_freed_memory
from sprint.base.errors import SprintError
from sprint.data.batch import Batch
from sprint.engine.compiled import compile_blocks
from sprint.engine.engine import keep_time_in_float32
from sprint.maths.dual import value_and_tangent
from sprint.models.student import Student, from_adapted
from sprint.recipe.schema import Precision
from tools.bench.measure import (
    SIZES,
    Request,
    Size,
    add_request,
    engine_of,
    in_fresh_process,
    interleaved,
    peak_memory,
    ratio,
    requested,
    summary,
    write_results,
)
from tools.bench.plain_step import value_and_tangent_in_two_passes

EAGER = ("plain", "two passes", "ours", "ours, as trained")
COMPILED = ("plain, compiled", "ours, compiled")
AS_TRAINED = ("ours, as trained", "ours, compiled")
WANTED = {  # (variant, what it is divided by): the ratio of times asked for
    ("ours", "plain"): 1.40,
    ("ours, as trained", "plain"): None,
    ("ours, compiled", "plain"): 1.15,
    ("ours, compiled", "plain, compiled"): None,
    ("two passes", "plain"): None,
}
WANTED_MEMORY = 1.2


def inputs_of(size: Size, batch: int, device: torch.device | str) -> tuple[Batch, Tensor, Tensor]:
    """-> random latents and text, times t [B], guidance [B]; the same at every call"""
    torch.manual_seed(1)
    data = size.batch_of(batch, device)
    t = torch.linspace(0.1, 1.5, batch, device=device)
    return data, t, torch.full((batch,), 4.5, device=device)


def pass_of(variant: str, request: Request) -> Callable[[], None]:
    """One forward of the variant and its backward, on a student of its own."""
    size, batch, engine = SIZES[request.network], request.batch, engine_of(request)
    device = engine.device
    student = Student(from_adapted(size.teacher(device))).to(device).train()
    if variant in AS_TRAINED:
        engine.hasten(student)
    if request.precision is Precision.bf16:
        keep_time_in_float32(student)
    data, t, guidance = inputs_of(size, batch, device)
    v_x, v_t = torch.randn_like(data.latent), torch.cos(t) * torch.sin(t)
    if variant.endswith("compiled"):
        compile_plain(student) if variant.startswith("plain") else compile_ours(student)

    def F(x_hat: Tensor, t: Tensor) -> Tensor:
        return student(x_hat, t, data.text, data.mask, guidance)

    def value() -> Tensor:
        if variant.startswith("plain"):
            return F(data.latent, t)
        both = value_and_tangent_in_two_passes if variant == "two passes" else value_and_tangent
        return both(F, data.latent, t, v_x, v_t)[0]

    def run() -> None:
        with engine.autocast():
            loss = value().square().mean()
        loss.backward()
        student.zero_grad(set_to_none=True)

    return run


# ---- compiling --------------------------------------------------------------------------------------


def compile_plain(student: Student) -> None:
    """Block by block, as diffusers recommends: one graph for all of them."""
    for block in student.network.transformer_blocks:
        block.compile()


def compile_ours(student: Student) -> None:
    """As the trainer does."""
    compile_blocks(student.network)


# ---- measuring --------------------------------------------------------------------------------------


def memory_of(variant: str, request: Request) -> int:
    """Bytes above the weights at the highest point of one call, after one that fills caches."""
    run = pass_of(variant, request)
    run()
    return peak_memory(run)


def measure(request: Request, variants: tuple[str, ...], rounds: int) -> dict:
    """Seconds and peak bytes by variant, and their ratios."""
    peaks = {name: in_fresh_process(memory_of, name, request) for name in variants}
    keep_freed_memory()
    seconds = interleaved({name: pass_of(name, request) for name in variants}, rounds, warmup=2)
    pairs = [(a, b) for a, b in WANTED if a in variants and b in variants]
    return {
        **request.record(),
        "rounds": rounds,
        "floor": 4 / 3,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "peak_bytes": peaks,
        "time_ratio": {f"{a} / {b}": ratio(seconds[a], seconds[b]) for a, b in pairs},
        "memory_ratio": {f"{a} / {b}": peaks[a] / peaks[b] for a, b in pairs},
    }


# ---- the page ---------------------------------------------------------------------------------------


def page(results: dict) -> str:
    lines = [
        f"{results['network']}, batch {results['batch']}, {results['precision']}, {results['device']}; "
        f"medians of {results['rounds']} rounds",
        f"{'':32}{'seconds':>10}{'peak MB':>10}",
    ]
    for name, seconds in results["seconds"].items():
        lines.append(f"{name:32}{seconds['median']:10.3f}{results['peak_bytes'][name] / 1e6:10.0f}")
    lines += ["", f"{'':32}{'time':>10}{'(spread)':>16}{'wanted':>10}{'memory':>10}{'wanted':>10}"]
    for (a, b), wanted in WANTED.items():
        name = f"{a} / {b}"
        if name in results["time_ratio"]:
            time = results["time_ratio"][name]
            spread = f"({time['min']:.2f}-{time['max']:.2f})"
            lines.append(
                f"{name:32}{time['median']:10.2f}{spread:>16}{f'≤ {wanted:.2f}' if wanted else '':>10}"
                f"{results['memory_ratio'][name]:10.2f}{f'≤ {WANTED_MEMORY:.2f}' if wanted else '':>10}"
            )
    return "\n".join([*lines, "floor of ours / plain by FLOPs: 1.33"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_request(parser)
    parser.add_argument("--compile", action="store_true", help="measure the compiled variants as well")
    args = parser.parse_args(argv)
    try:
        results = measure(requested(args), EAGER + COMPILED if args.compile else EAGER, args.rounds)
    except (SprintError, torch.OutOfMemoryError) as error:
        print(f"bench_jvp: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(page(results))
    print(write_results(f"bench_jvp_{args.network}_{args.device}", results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
