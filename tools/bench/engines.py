"""Engines side by side on a CPU: the same losses whoever holds what, and less memory in each process.

    python -m tools.bench.engines              # both tables; some ten minutes on two idle cores
    python -m tools.bench.engines --only losses
    python -m tools.bench.engines --quick      # a few cases on 1 and 2 processes, to see that it works

Losses: the built-in teacher and real scenes, a global batch of 16, AdamW, on 1, 2 and 4 processes (gloo). Every case
is compared, loss by loss, with one process that takes the whole batch at once; differences are relative where a loss
is above 1. In fp32 they are wanted at most 1e-5. Two groups have no goal, and for scale a row of one process that cuts
the batch otherwise:
    bf16   a product over half the batch rounds otherwise than one over all of it
    CAME   divides by its own statistics of a gradient: where that is only rounding, a whole step hangs on rounding

Memory: a random network of about 20M weights in fp32 with AdamW, an average, the frozen teacher and the heads. Bytes
are counted storage by storage when all gradients of the generator are there and its graph is gone: what stays from
update to update. Beside it stands what `sprint distill --dry-run` plans for the same; wanted within 10%, and less with
every doubling of the processes wherever the engine cuts something. The peak is what the system saw of a process
(resident memory above that of its start, activations included), which is less exact, and is not judged.

Needs DeepSpeed and, with 4 processes, 6 GB of memory. Both tables together go to tools/results/engines.json. The
exit status is 1 where a goal was missed.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sprint.base.errors import SprintError
from sprint.engine.zero import BUCKET
from sprint.models.sana.family import Sana
from sprint.recipe.schema import EngineKind, OptimizerKind, Precision
from sprint.train.plan.activations import FP32
from sprint.train.plan.engines import WHOLE
from sprint.train.plan.networks import networks_of
from sprint.train.plan.plan import ACTIVATIONS, distill_memory, totals_of
from tools.bench.engine_cases import (
    BATCH,
    Case,
    memory_recipe,
    memory_size,
    prepare,
)
from tools.bench.measure import RETURN_AT_ONCE, ROOT, write_results

WANTED = 1e-5  # largest difference of a loss, in fp32 with AdamW
WANTED_PLAN = 0.1  # of the plan
STAGES = {"adapt": 4, "distill": 20}  # steps
QUICK_STAGES = {"adapt": 1, "distill": 4}
SINGLE, DDP, FSDP2, ZERO2, ZERO3 = EngineKind
SHARED = (Case(DDP), Case(FSDP2), Case(FSDP2, shard_teacher=True), Case(ZERO2), Case(ZERO3))
IN_SHARDS = Case(FSDP2, shard_size=2)  # on four processes: two copies of the weights
Cases = dict[int, list[Case]]  # by number of processes


def losses_cases(quick: bool) -> Cases:
    """The first is what the others are compared with, but for precision and optimizer."""
    alone = [Case(), Case(micro_batch=4)]
    if quick:
        return {1: alone, 2: [Case(DDP), Case(FSDP2, micro_batch=4, shard_teacher=True), Case(ZERO3)]}
    bf16, came = {"precision": Precision.bf16}, {"optimizer": OptimizerKind.came}
    on_four = [*SHARED, IN_SHARDS]
    return {
        1: [case._replace(**group) for group in ({}, bf16, came) for case in alone]
        + [Case(kind) for kind in (DDP, FSDP2, ZERO2, ZERO3)],
        2: [case._replace(micro_batch=size) for case in SHARED for size in (0, 4)]
        + [case._replace(**bf16) for case in SHARED]
        + [case._replace(**came) for case in SHARED[:3]],
        4: [*on_four, *(case._replace(**bf16) for case in on_four), IN_SHARDS._replace(**came)],
    }


def memory_cases(quick: bool) -> Cases:
    kinds = (DDP, FSDP2, ZERO2, ZERO3)
    several = [Case(kind, shard_teacher=teacher) for kind in kinds for teacher in (False, True)]
    if quick:
        return {1: [Case()], 2: several[:4]}
    return {1: [Case(), *map(Case, kinds)], 2: several, 4: [*several, IN_SHARDS]}


# ---- measuring --------------------------------------------------------------------------------------


def in_processes(what: str, folder: Path, processes: int, cases: list[Case], settings: dict) -> list[dict]:
    """What tools/bench/engine_cases.py found for each case. Raises SprintError with its last words if it failed."""
    asked = {"cases": [case._asdict() for case in cases]} | settings
    (folder / f"{what}-{processes}.json").write_text(json.dumps(asked))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    quiet = {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    memory = RETURN_AT_ONCE if what == "memory" else {}
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [sys.executable, *command, "-m", "tools.bench.engine_cases", what, str(folder)],
        env=os.environ | quiet | memory | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SprintError(
            f"{what} on {processes} processes ended with {done.returncode}:\n{done.stderr[-3000:]}"
        )
    return json.loads((folder / f"found-{what}-{processes}.json").read_text())


def measure_losses(quick: bool, folder: Path) -> list[dict]:
    """A row for each case, with its differences and whether the goal is met."""
    steps = QUICK_STAGES if quick else STAGES
    print("bench_engines: the built-in teacher, calibrated, and batches of scenes", file=sys.stderr)
    prepare(folder, max(steps.values()))
    settings, rows = {f"{stage}_steps": count for stage, count in steps.items()}, []
    for processes, cases in losses_cases(quick).items():
        print(f"bench_engines: losses, {len(cases)} cases on {processes} processes", file=sys.stderr)
        found = in_processes("losses", folder, processes, cases, settings)
        rows += [
            {"processes": processes} | row_of(case, each) for case, each in zip(cases, found, strict=True)
        ]
    return judged_losses(rows)


def measure_memory(quick: bool, folder: Path) -> list[dict]:
    """A row for each case, with the plan's figures."""
    network, rows = "tiny" if quick else "20m", []
    for processes, cases in memory_cases(quick).items():
        print(f"bench_engines: memory, {len(cases)} cases on {processes} processes", file=sys.stderr)
        found = in_processes("memory", folder, processes, cases, {"network": network})
        for case, each in zip(cases, found, strict=True):
            plan = planned(case, network, processes)
            rows.append({"processes": processes, "network": network} | row_of(case, each) | plan)
    return judged_memory(rows)


def row_of(case: Case, found: dict) -> dict:
    return {"name": str(case)} | case._asdict() | {"in_force": found.pop("engine")} | found


def planned(case: Case, network: str, processes: int) -> dict[str, int]:
    """Bytes that stay from update to update, and at the highest moment."""
    size = memory_size(network)
    tokens = (size.config["sample_size"] // size.config["patch_size"]) ** 2
    networks = networks_of(Sana(), size.config | {"qk_norm": None}, len(size.taps), tokens)
    parts = distill_memory(memory_recipe(case, network), networks, processes)
    stays = sum(size for name, size in parts.items() if not name.endswith(WHOLE) and name not in ACTIVATIONS)
    stays += FP32 * BUCKET * (case.engine is ZERO3 and processes > 1)  # it never lets its bucket go
    return {"planned_bytes": round(stays), "planned_peak": round(totals_of(parts).kept)}


# ---- judging ----------------------------------------------------------------------------------------


def largest_difference(losses: list[float], expected: list[float]) -> float | None:
    """Relative where a loss is above 1; None where one is not finite. Raises ValueError for another number of them."""
    gaps = [abs(a - b) / max(1.0, abs(b)) for a, b in zip(losses, expected, strict=True)]
    return max(gaps) if all(map(math.isfinite, gaps)) else None


def judged_losses(rows: list[dict]) -> list[dict]:
    """With the differences from the one process of the same precision and optimizer that takes the batch at once.

    difference   the largest of each stage, and of stage 2's first loss, before which no weight has moved
    met          None where there is no goal

    The losses themselves stay with those that are compared with.
    """

    def group(row: dict) -> tuple:
        return row["precision"], row["optimizer"]

    whole = {group(row): row for row in rows if row["engine"] is SINGLE and not row["micro_batch"]}
    judged = []
    for row in rows:
        reference = whole[group(row)]
        adapt, distill = (largest_difference(row[stage], reference[stage]) for stage in STAGES)
        first = largest_difference(row["distill"][:1], reference["distill"][:1])
        within = all(gap is not None and gap <= WANTED for gap in (adapt, distill))
        met = within if group(row) == (Precision.fp32, OptimizerKind.adamw) else None
        kept = row if row is reference else {name: row[name] for name in row if name not in STAGES}
        judged.append(kept | {"difference": {"adapt": adapt, "first": first, "distill": distill}, "met": met})
    return judged


def judged_memory(rows: list[dict]) -> list[dict]:
    """With the sum of the parts, over the plan, and whether that is near 1 and, of what is cut, falls."""
    held = {(row["name"], row["processes"]): sum(row["parts"].values()) for row in rows}
    judged = []
    for row in rows:
        bytes_ = held[row["name"], row["processes"]]
        fewer = [size for (name, n), size in held.items() if name == row["name"] and n < row["processes"]]
        over_plan = bytes_ / row["planned_bytes"]
        cut = row["engine"] not in (SINGLE, DDP) or row["shard_teacher"]
        falls = not cut or all(size > bytes_ for size in fewer)
        met = falls and abs(over_plan - 1) <= WANTED_PLAN
        judged.append(row | {"bytes": bytes_, "over_plan": over_plan, "falls": falls, "met": met})
    return judged


def missed(rows: list[dict]) -> list[str]:
    return [f"{row['name']} on {row['processes']}" for row in rows if row["met"] is False]


# ---- the page ---------------------------------------------------------------------------------------


def losses_table(rows: list[dict]) -> str:
    lines = [
        "| | | processes | at once | stage 1 | stage 2, first loss | stage 2 | wanted | |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        gaps = [_scientific(row["difference"][name]) for name in ("adapt", "first", "distill")]
        share = BATCH // row["processes"]
        cells = [
            row["name"],
            f"{row['precision'].value}, {row['optimizer'].value}",
            row["processes"],
            min(share, row["micro_batch"] or share),
            *gaps,
            "" if row["met"] is None else f"≤ {WANTED:.0e}",
            _word(row["met"]),
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def memory_table(rows: list[dict]) -> str:
    parts = list(rows[0]["parts"])
    head = ["MB", "processes", *parts, "**held**", "planned", "held ÷ planned", "peak", "planned", ""]
    lines = [_line(head), "|---" * len(head) + "|"]
    for row in rows:
        cells = [
            row["name"],
            row["processes"],
            *(_mb(size) for size in row["parts"].values()),
            f"**{_mb(row['bytes'])}**",
            _mb(row["planned_bytes"]),
            f"{row['over_plan']:.3f}",
            _mb(row["resident"]),
            _mb(row["planned_peak"]),
            _word(row["met"]) if row["falls"] else "**does not fall**",
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: list) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _scientific(gap: float | None) -> str:
    return "not finite" if gap is None else f"{gap:.1e}" if gap else "0"


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f}"


def _word(met: bool | None) -> str:
    return {True: "met", False: "**missed**", None: ""}[met]


PARTS = {"losses": (measure_losses, losses_table), "memory": (measure_memory, memory_table)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="one of the two tables; writes nothing")
    parser.add_argument("--quick", action="store_true", help="a few cases; writes nothing")
    args = parser.parse_args(argv)
    results: dict[str, list[dict]] = {}
    try:
        for name, (measure, table) in PARTS.items():
            if args.only in (None, name):
                with tempfile.TemporaryDirectory() as folder:
                    results[name] = measure(args.quick, Path(folder))
                print(f"{table(results[name])}\n", flush=True)
    except SprintError as error:
        print(f"bench_engines: {error}", file=sys.stderr)
        return 2
    if not args.quick and not args.only:
        goals = {"wanted_difference": WANTED, "wanted_of_plan": WANTED_PLAN, "global_batch": BATCH}
        print(write_results("engines", goals | results))
    failures = [name for rows in results.values() for name in missed(rows)]
    if failures:
        print(f"bench_engines: missed by {', '.join(failures)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
