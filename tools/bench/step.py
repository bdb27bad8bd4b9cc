"""One generator update and one discriminator update: sprint's step against the published one, written plainly.

    python -m tools.bench.step                    # 20M Sana, batch 8, CPU: about four minutes on two cores
    python -m tools.bench.step --network 0.6b --device cuda --precision bf16 --checkpointing

    plain           tools/bench/plain_step.py: the published algorithm as its trainers compute it
    ours            sprint.train.distill.DistillStage
    ours, products  the same with torch's own matrix products, on CPUs where sprint/base/products.py picks others
    ours, compiled  with compile=true, for --compile

Same networks, random from one seed, same batches, optimizer (CAME) and draws. Times are medians of interleaved
rounds, with freed memory kept as a run keeps it; memory is a process of its own that builds the step and makes
two updates of each phase: weights, gradients, optimizer state and all. Writes
tools/results/bench_step_NETWORK_DEVICE.json (NETWORK_DEVICE_checkpointing.json with --checkpointing).
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count

import torch

from sprint.base.cpu import keep_freed_memory
from sprint.base.errors import SprintError
from sprint.base.products import onednn_is_faster
from sprint.recipe.schema import Adversarial, Distill, Recipe, Text
from sprint.train.distill import DistillStage
from tools.bench.measure import (
    SIZES,
    Request,
    add_request,
    engine_of,
    in_fresh_process,
    interleaved,
    peak_memory,
    ratio,
    requested,
    summary,
    torchs_products,
    write_results,
)
from tools.bench.plain_step import PlainStep

VARIANTS = ("plain", "ours")
SAME_PRODUCTS, COMPILED = "ours, products", "ours, compiled"  # timed, not weighed
WANTED = {"cpu": (1.5, 0.7), "cuda": (2.0, 0.5)}  # samples per second at least, peak memory at most
BATCHES = 4  # taken in turn, so that no phase sees the same batch twice running

Update = Callable[[int], object]


def recipe_of(request: Request, checkpointing: bool) -> Recipe:
    """The paper's settings; only what the network and the request ask for differs."""
    size = SIZES[request.network]
    return Recipe(
        name="bench",
        precision=request.precision,
        activation_checkpointing=checkpointing,
        text=Text(max_length=size.text_tokens),
        distill=Distill(batch_size=request.batch, adversarial=Adversarial(taps=size.taps)),
    )


def update_of(variant: str, request: Request, checkpointing: bool) -> Update:
    """Builds the variant's step.  -> update(step): even steps train the generator, odd ones the discriminator"""
    size, recipe, engine = SIZES[request.network], recipe_of(request, checkpointing), engine_of(request)
    teacher = size.teacher(engine.device)
    torch.manual_seed(1)
    null = size.text(1, engine.device)
    batches = [size.batch_of(request.batch, engine.device) for _ in range(BATCHES)]
    recipe.compile = variant == COMPILED
    with torchs_products() if variant == SAME_PRODUCTS else nullcontext():
        if variant == "plain":
            stage = PlainStep(recipe, engine, teacher, null)
        else:
            stage = DistillStage(recipe, engine, teacher, null, size.latent)
    return lambda step: stage.update(step, batches[step % BATCHES])


# ---- measuring --------------------------------------------------------------------------------------


def time_phases(updates: dict[str, Update], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every update by variant and phase, G D G D ... with the variants in turn, and of the pair."""
    calls = {}
    for name, update in updates.items():
        for phase, steps in (("G", count(0, 2)), ("D", count(1, 2))):
            calls[name, phase] = lambda update=update, steps=steps: update(next(steps))
    seconds = interleaved(calls, rounds)
    return {
        name: {
            "G": seconds[name, "G"],
            "D": seconds[name, "D"],
            "G+D": [g + d for g, d in zip(seconds[name, "G"], seconds[name, "D"], strict=True)],
        }
        for name in updates
    }


def memory_of(variant: str, request: Request, checkpointing: bool) -> dict[str, int]:
    """Highest point in bytes: of building the step and two updates of each phase; of each phase above its start."""
    if request.device == "cuda":
        torch.cuda.init()
    made: list[Update] = []

    def build_and_run() -> None:
        made.append(update_of(variant, request, checkpointing))
        for step in range(4):
            made[0](step)

    everything = peak_memory(build_and_run)
    phases = {phase: peak_memory(lambda step=step: made[0](step)) for step, phase in ((4, "G"), (5, "D"))}
    return {"everything": everything} | phases


def timed_variants(request: Request, compiled: bool) -> tuple[str, ...]:
    other_products = request.device == "cpu" and onednn_is_faster()
    return VARIANTS + (SAME_PRODUCTS,) * other_products + (COMPILED,) * compiled


def measure(request: Request, checkpointing: bool, compiled: bool, rounds: int) -> dict:
    peaks = {name: in_fresh_process(memory_of, name, request, checkpointing) for name in VARIANTS}
    keep_freed_memory()
    variants = timed_variants(request, compiled)
    seconds = time_phases({name: update_of(name, request, checkpointing) for name in variants}, rounds)
    plain = seconds["plain"]
    return {
        **request.record(),
        "activation_checkpointing": checkpointing,
        "rounds": rounds,
        "seconds": {
            name: {phase: summary(values) for phase, values in phases.items()}
            for name, phases in seconds.items()
        },
        "samples_per_second": {  # a pair of updates takes two batches
            name: summary([2 * request.batch / pair for pair in phases["G+D"]])
            for name, phases in seconds.items()
        },
        "peak_bytes": peaks,
        "speed_ratio": {
            name: {phase: ratio(plain[phase], seconds[name][phase]) for phase in plain}
            for name in variants[1:]
        },
        "memory_ratio": {part: peaks["ours"][part] / peaks["plain"][part] for part in peaks["plain"]},
    }


# ---- the page ---------------------------------------------------------------------------------------


def page(results: dict) -> str:
    faster, smaller = WANTED[results["device"]]
    lines = [
        f"{results['network']}, batch {results['batch']}, {results['precision']}, {results['device']}; "
        f"{'activation checkpointing, ' * results['activation_checkpointing']}medians of {results['rounds']} rounds",
        f"{'':16}{'G s':>8}{'D s':>8}{'G+D s':>8}{'samples/s':>11}{'peak MB':>10}{'G MB':>8}{'D MB':>8}",
    ]
    for name, phases in results["seconds"].items():
        times = "".join(f"{phases[phase]['median']:8.2f}" for phase in ("G", "D", "G+D"))
        line = f"{name:16}{times}{results['samples_per_second'][name]['median']:11.2f}"
        if peaks := results["peak_bytes"].get(name):
            line += f"{peaks['everything'] / 1e6:10.0f}{peaks['G'] / 1e6:8.0f}{peaks['D'] / 1e6:8.0f}"
        lines.append(line)
    lines.append("")
    for name, speed in results["speed_ratio"].items():
        pair = speed["G+D"]
        lines.append(
            f"speed, {name} over plain: {pair['median']:.2f} ({pair['min']:.2f}-{pair['max']:.2f}), "
            f"G {speed['G']['median']:.2f}, D {speed['D']['median']:.2f}; wanted: at least {faster}"
        )
    memory = results["memory_ratio"]
    lines.append(
        f"memory, ours over plain: {memory['everything']:.2f}, above each update's start "
        f"G {memory['G']:.2f}, D {memory['D']:.2f}; wanted: at most {smaller}"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_request(parser)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, in both")
    parser.add_argument("--compile", action="store_true", help="time compiled blocks as well: minutes more")
    args = parser.parse_args(argv)
    try:
        results = measure(requested(args), args.checkpointing, args.compile, args.rounds)
    except (SprintError, torch.OutOfMemoryError) as error:
        print(f"bench_step: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(page(results))
    ending = "_checkpointing" if args.checkpointing else ""
    print(write_results(f"bench_step_{args.network}_{args.device}{ending}", results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
