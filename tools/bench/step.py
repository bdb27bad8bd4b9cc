"""One generator update and one discriminator update: sprint's step against the published one, written plainly.

    python -m tools.bench.step                    # 20M Sana, batch 8, CPU
    python -m tools.bench.step --network tiny     # the built-in family, with its recipe's batch, text and taps
    python -m tools.bench.step --compile          # compiled blocks as well: minutes more
    python -m tools.bench.step --network 0.6b --device cuda --precision bf16 --checkpointing

    plain                 tools/bench/plain_step.py: the published algorithm as its trainers compute it, with the
                          products that pip's torch gives
    plain, same products  the same with the matrix products of ours and nothing else of it (tools/bench/variants.py)
    ours                  sprint.train.distill.DistillStage, products=exact
    ours, fastest         products=fastest; on a CPU that multiplies bf16 faster
    ours, compiled        products=fastest and compile=true, for --compile

Each of ours is held against plain, and against the plain step whose products are the same where that is another.
Same networks, random from one seed, same batches, optimizer (CAME) and draws. Times are medians of interleaved
rounds, with freed memory kept as a run keeps it; memory is a process of its own that builds the step and makes
two updates of each phase: weights, gradients, optimizer state and all. Writes
tools/results/bench_step_NETWORK_DEVICE.json (NETWORK_DEVICE_checkpointing.json with --checkpointing).
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import NamedTuple

import torch

from sprint.base.cpu import keep_freed_memory
from sprint.base.errors import SprintError
from sprint.recipe.schema import Adversarial, Distill, Recipe, Text
from sprint.train.distill import DistillStage
from tools.bench.measure import (
    SIZES,
    Request,
    add_request,
    in_fresh_process,
    interleaved,
    peak_memory,
    ratio,
    requested,
    summary,
    write_results,
)
from tools.bench.plain_step import PlainStep
from tools.bench.variants import PLAIN, Variant, rivals_of, variants_of


class Goal(NamedTuple):
    """Samples per second over plain's at least, better still, and peak memory over plain's at most."""

    speed: float
    stretch: float | None = None
    memory: float | None = None


GOALS = {  # by network and device
    ("20m", "cpu"): Goal(2.0, stretch=3.0, memory=0.6),
    ("tiny", "cpu"): Goal(3.5),
    ("0.6b", "cuda"): Goal(2.0, memory=0.5),
}
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


def update_of(variant: Variant, request: Request, checkpointing: bool) -> Update:
    """Builds the variant's step.  -> update(step): even steps train the generator, odd ones the discriminator"""
    size, recipe, engine = SIZES[request.network], recipe_of(request, checkpointing), variant.engine(request)
    teacher = size.teacher(engine.device)
    torch.manual_seed(1)
    null = size.text(1, engine.device)
    batches = [size.batch_of(request.batch, engine.device) for _ in range(BATCHES)]
    recipe.compile = variant.compiled
    if variant.ours:
        stage = DistillStage(recipe, engine, teacher, null, size.latent)
    else:
        stage = PlainStep(recipe, engine, teacher, null, partial(variant.hasten, engine))
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


def memory_of(variant: Variant, request: Request, checkpointing: bool) -> dict[str, int]:
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


def measure(request: Request, checkpointing: bool, compiled: bool, rounds: int) -> dict:
    variants = variants_of(request.device, compiled)
    weighed = [each for each in variants if each is PLAIN or (each.ours and not each.compiled)]
    peaks = {each.name: in_fresh_process(memory_of, each, request, checkpointing) for each in weighed}
    keep_freed_memory()
    seconds = time_phases({each.name: update_of(each, request, checkpointing) for each in variants}, rounds)
    goal = GOALS.get((request.network, request.device))
    return {
        **request.record(),
        "activation_checkpointing": checkpointing,
        "rounds": rounds,
        "multiplied_by": {each.name: each.multiply().__name__ for each in variants},
        "goal": goal and goal._asdict(),
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
            each.name: {
                rival.name: speeds_over(seconds[rival.name], seconds[each.name])
                for rival in rivals_of(each, variants, request.device)
            }
            for each in variants
            if each.ours
        },
        "memory_ratio": {
            each.name: {part: peak / peaks[PLAIN.name][part] for part, peak in peaks[each.name].items()}
            for each in weighed
            if each.ours
        },
    }


def speeds_over(rival: dict[str, list[float]], ours: dict[str, list[float]]) -> dict[str, dict]:
    """How often as fast, by phase: median and spread over rounds."""
    return {phase: ratio(rival[phase], ours[phase]) for phase in ours}


# ---- the page ---------------------------------------------------------------------------------------


def page(results: dict) -> str:
    lines = [
        f"{results['network']}, batch {results['batch']}, {results['precision']}, {results['device']}; "
        f"{'activation checkpointing, ' * results['activation_checkpointing']}medians of {results['rounds']} rounds",
        f"{'':26}{'G s':>8}{'D s':>8}{'G+D s':>8}{'samples/s':>11}{'peak MB':>10}{'G MB':>8}{'D MB':>8}",
    ]
    for name, phases in results["seconds"].items():
        times = "".join(f"{phases[phase]['median']:8.2f}" for phase in ("G", "D", "G+D"))
        line = f"{name:26}{times}{results['samples_per_second'][name]['median']:11.2f}"
        if peaks := results["peak_bytes"].get(name):
            line += f"{peaks['everything'] / 1e6:10.0f}{peaks['G'] / 1e6:8.0f}{peaks['D'] / 1e6:8.0f}"
        lines.append(line)
    goal = Goal(**results["goal"]) if results["goal"] else None
    return "\n".join([*lines, "", *speed_lines(results["speed_ratio"], goal), *memory_lines(results, goal)])


def speed_lines(ratios: dict, goal: Goal | None) -> list[str]:
    lines = []
    for name, rivals in ratios.items():
        for rival, speed in rivals.items():
            pair = speed["G+D"]
            line = (
                f"speed, {name} over {rival}: {pair['median']:.2f} ({pair['min']:.2f}-{pair['max']:.2f}), "
                f"G {speed['G']['median']:.2f}, D {speed['D']['median']:.2f}"
            )
            if goal:
                stretch = f", better {goal.stretch}" if goal.stretch else ""
                short = ": falls short" * (pair["median"] < goal.speed)
                line += f"; wanted at least {goal.speed}{stretch}{short}"
            lines.append(line)
    return lines


def memory_lines(results: dict, goal: Goal | None) -> list[str]:
    lines = []
    for name, memory in results["memory_ratio"].items():
        line = (
            f"memory, {name} over {PLAIN.name}: {memory['everything']:.2f}, above each update's start "
            f"G {memory['G']:.2f}, D {memory['D']:.2f}"
        )
        if goal and goal.memory:
            short = ": falls short" * (memory["everything"] > goal.memory)
            line += f"; wanted at most {goal.memory}{short}"
        lines.append(line)
    return lines


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
