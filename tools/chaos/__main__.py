"""Kills, starves and poisons small distillation runs in every way we know, and looks for what was lost.

    python -m tools.chaos                       everything: about six minutes on two idle cores
    python -m tools.chaos --quick               fewer kills
    python -m tools.chaos --only kills          one case
    python -m tools.chaos --only kills --seed 7

A run that was killed, damaged or starved is started again by the same command. In the end it must have the very bits of
a run that nobody disturbed, and the same losses, each step once. The moments are random, drawn from the seed over
the whole life of a run, and printed. Exits with 1 if anything was lost, and keeps the
folder of the runs then. Writes tools/results/chaos.json when all cases were tried.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from sprint.base.errors import SprintError
from tools.chaos.data import poisoned_data
from tools.chaos.disk import damaged_checkpoints, full_disk
from tools.chaos.kills import (
    command_line,
    dying_rank,
    kills_of_one,
    kills_of_two,
    second_run,
    stop_requests,
)
from tools.chaos.lab import Lab, Outcome
from tools.chaos.runs import SETTINGS, Size, Stuck, Zygote

KILLS = 20  # of one process, and of two
Case = Callable[[Lab, Outcome], None]
CASES: dict[str, Case] = {
    "kills": kills_of_one,
    "kills-ddp": kills_of_two,
    "stop": stop_requests,
    "dying-rank": dying_rank,
    "damaged": damaged_checkpoints,
    "full-disk": full_disk,
    "poison": poisoned_data,
    "second-run": second_run,
    "command-line": command_line,
}
EVERY_RUN = [*SETTINGS, *Size().settings]
# what a case may raise: then something is lost
FAILURES = (Stuck, SprintError, OSError, KeyError, IndexError, ValueError)


def run_case(name: str, lab: Lab) -> Outcome:
    """Try it; whatever stops it counts as lost."""
    outcome = Outcome(name)
    print(f"{name}: {' '.join(CASES[name].__doc__.split())}", flush=True)
    began, cpu = time.monotonic(), cpu_seconds(lab)
    try:
        CASES[name](lab, outcome)
    except FAILURES as error:
        outcome.require(False, f"{type(error).__name__}: {error}")
    finally:
        lab.clear()
    outcome.seconds = round(time.monotonic() - began, 1)
    outcome.cpu_seconds = round(cpu_seconds(lab) - cpu, 1)
    return outcome


def cpu_seconds(lab: Lab) -> float:
    """Of everything that was started and has ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return lab.zygote.cpu_seconds + usage.ru_utime + usage.ru_stime


def table(outcomes: list[Outcome]) -> str:
    """One row a case."""
    lines = [f"{'case':14}{'tried':>6}{'seconds':>9}{'CPU':>8}  lost"]
    for o in outcomes:
        lost = "; ".join(o.lost) or "nothing"
        lines.append(f"{o.name:14}{len(o.tried):6}{o.seconds:9.1f}{o.cpu_seconds:8.1f}  {lost}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m tools.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--seed", type=int, default=0, help="of all random moments and damages (default 0)")
    found.add_argument(
        "--quick", action="store_true", help=f"{KILLS // 3} kills of each kind instead of {KILLS}"
    )
    found.add_argument("--only", choices=CASES, action="append", help="this case alone; may be given again")
    return found


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    names = args.only or list(CASES)
    began = time.monotonic()
    print(f"seed {args.seed}; each run: sprint distill tiny {' '.join(EVERY_RUN)}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="sprint-chaos-"))
    with Zygote() as zygote:
        lab = Lab(folder, zygote, args.seed, KILLS // 3 if args.quick else KILLS, Size())
        outcomes = [run_case(name, lab) for name in names]
    lost = sum(len(outcome.lost) for outcome in outcomes)
    print(f"\n{table(outcomes)}\n")
    print(f"lost: {lost or 'nothing'}. {time.monotonic() - began:.0f} s with seed {args.seed}.")
    if lost:
        print(f"What is left of the runs is in {folder}.")
    else:
        shutil.rmtree(folder)
    if names == list(CASES):
        print(write(args, outcomes, folder))
    return int(lost > 0)


def write(args: argparse.Namespace, outcomes: list[Outcome], folder: Path) -> Path:
    """tools/results/chaos.json, in which paths begin at the folder of the runs."""
    # it imports torch and diffusers, which nothing else here needs
    from tools.bench.measure import write_results

    results = {"seed": args.seed, "quick": args.quick, "settings": EVERY_RUN}
    results["cases"] = [asdict(outcome) for outcome in outcomes]
    return write_results("chaos", json.loads(json.dumps(results).replace(f"{folder}{os.sep}", "")))


if __name__ == "__main__":
    sys.exit(main())
