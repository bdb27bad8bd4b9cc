"""Mutated files through every verb that reads them, and what came of each.

    python -m tools.fuzz                          # 10,400 cases, half an hour on two cores
    python -m tools.fuzz --seconds 60             # as many as a minute allows, every kind in turn
    python -m tools.fuzz --only recipe --count 200 --keep found

Every case is a `sprint` command in a process of its own, on files that are mutated from a seed. It must end by itself
within 20 s and 1 GB: with exit code 0, or with 2, one line, and nothing left behind. Nothing in a file may run.
Writes tools/results/fuzz.json. Exit code 1 if a case ended otherwise; --keep keeps such cases with what they said.
"""

import argparse
import collections
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from tools.bench.measure import write_results
from tools.fuzz.mutate import mutated
from tools.fuzz.run import BAD, OPENED, REFUSED, Outcome, run
from tools.fuzz.targets import TARGETS

COUNT, SELDOM = 800, 4  # cases of a kind, and one in so many where each takes a second


class Case(NamedTuple):
    target: int  # of TARGETS
    seed: int


class Found(NamedTuple):
    case: Case
    outcome: Outcome


def cases(targets: list[int], count: int, seed: int) -> list[Case]:
    """Every kind in turn, so that a run that is cut short has seen all of them."""
    return [
        Case(target, seed + i)
        for i in range(count)
        for target in targets
        if not (TARGETS[target].slow and i % SELDOM)
    ]


def try_case(case: Case, templates: Path, keep: Path | None) -> Found:
    target = TARGETS[case.target]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder = Path(place) / "case"
        shutil.copytree(templates / str(case.target), folder)
        file = folder / target.file
        chance = random.Random(f"{target.name} {case.seed}")
        file.write_bytes(mutated(chance, file.read_bytes(), target.mutations))
        outcome = run(target.command, folder, Path(place) / "said", target.keeps)
        if keep and outcome.kind in BAD:
            kept = keep / f"{target.name.replace('/', '-')} {case.seed}"
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            shutil.copy(Path(place) / "said", kept)
    return Found(case, outcome)


def make_templates(targets: list[int], folder: Path) -> None:
    """A folder for every kind, FOLDER/NUMBER; what several start from is made once."""
    made: dict[Callable, Path] = {}
    for number in targets:
        make, place = TARGETS[number].make, folder / str(number)
        if make in made:
            shutil.copytree(made[make], place)
        else:
            place.mkdir(parents=True)
            make(place)
            made[make] = place


def fuzz(
    targets: list[int], count: int, seconds: float, seed: int, jobs: int, keep: Path | None
) -> list[Found]:
    """Until every case is tried, or for so many seconds."""
    found: list[Found] = []
    torch.set_num_threads(1)  # the workers are forks, and threads do not survive that
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        templates, everything = Path(folder), cases(targets, count, seed)
        make_templates(targets, templates)
        until = time.monotonic() + seconds
        with ProcessPoolExecutor(jobs) as pool, tqdm(total=len(everything), desc="cases", leave=False) as bar:
            for start in range(0, len(everything), 8 * jobs):
                if time.monotonic() > until:
                    break
                part = everything[start : start + 8 * jobs]
                for each in pool.map(try_case, part, [templates] * len(part), [keep] * len(part)):
                    found.append(each)
                    bar.update(1)
    return found


def table(found: list[Found]) -> dict[str, dict[str, float]]:
    """By kind of file: cases by outcome, the longest in seconds and the largest in bytes."""
    rows: dict[str, dict[str, float]] = {}
    for target in dict.fromkeys(TARGETS[each.case.target] for each in found):
        outcomes = [each.outcome for each in found if TARGETS[each.case.target] is target]
        counts = collections.Counter(outcome.kind for outcome in outcomes)
        rows[target.name] = {
            **{kind: counts[kind] for kind in (OPENED, REFUSED, *BAD)},
            "most seconds": round(max(outcome.seconds for outcome in outcomes), 2),
            "most bytes": max(outcome.bytes for outcome in outcomes),
        }
    return rows


def page(rows: dict[str, dict[str, float]]) -> str:
    kinds = (OPENED, REFUSED, *BAD)
    lines = [f"{'':32}" + "".join(f"{kind:>13}" for kind in kinds) + f"{'most s':>9}{'most MB':>9}"]
    for name, row in rows.items():
        counts = "".join(f"{row[kind]:13}" for kind in kinds)
        lines.append(f"{name:32}{counts}{row['most seconds']:9.1f}{row['most bytes'] / 1e6:9.0f}")
    sums = "".join(f"{sum(row[kind] for row in rows.values()):13}" for kind in kinds)
    return "\n".join([*lines, f"{'all':32}{sums}"])


def chosen(words: list[str] | None) -> list[int]:
    return [
        number
        for number, target in enumerate(TARGETS)
        if not words or any(word in target.name for word in words)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--count",
        type=int,
        default=COUNT,
        help=f"cases of every kind (default {COUNT}); a quarter where each takes a second",
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="kinds whose names hold one of these words")
    parser.add_argument("--keep", type=Path, help="folder for the cases that ended badly")
    args = parser.parse_args(argv)
    targets = chosen(args.only)
    if not targets:
        parser.error(f"--only: no kind of file is called so; they are {', '.join(t.name for t in TARGETS)}")
    found = fuzz(targets, args.count, args.seconds, args.seed, args.jobs, args.keep)
    rows = table(found)
    print(page(rows))
    bad = [each for each in found if each.outcome.kind in BAD]
    for each in bad[:20]:
        print(
            f"{TARGETS[each.case.target].name}, seed {each.case.seed}: {each.outcome.kind}: {each.outcome.said}"
        )
    results = {"cases": len(found), "seed": args.seed, "kinds": rows}
    print(write_results("fuzz", results))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
