"""Part after part, each watched; what is done is kept in rehearsal.json and not repeated."""

import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from sprint.base.door import read_json
from sprint.base.environment import environment
from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.cli.shared import INTERRUPTED
from sprint.pages.html import duration, memory
from sprint.recipe.schema import EngineKind
from sprint.train.costs import read_costs
from sprint.train.plan.page import SPARE
from sprint.train.plan.plan import Plan, dry_run, totals_of, with_engine
from tools.rehearsal.page import page
from tools.rehearsal.parts import DRAWN, Part, Rehearsal
from tools.rehearsal.watch import Watched, watch

RECORD, PAGE = "rehearsal.json", "rehearsal.html"
LIBRARIES = (
    2**30
)  # bytes: a generous guess of what Python, torch and diffusers hold, for the check beforehand
FP32, BF16 = 4, 2  # bytes
GIB = 2**30
STAGES = {"adapt": "stage 1, adapt", "distill": "stage 2, distill"}  # names in a run's costs, and in a plan

Watch = Callable[..., Watched]


def rehearse(rehearsal: Rehearsal, folder: Path, start: Watch = watch) -> Path:
    """Everything that is not done yet.  -> the page

    Raises SprintError where there is too little memory or disk, where `folder` holds another rehearsal, and for a part
    that fails.
    """
    plan = plan_of(rehearsal)
    record = opened(folder / RECORD, rehearsal)
    todo = [part for part in rehearsal.parts() if part.name not in record["parts"]]
    if todo:
        check_room(plan, folder)
    for part in todo:
        number = 1 + [each.name for each in rehearsal.parts()].index(part.name)
        print(f"{number}/{len(rehearsal.parts())} {part.name}: {part.what}\n$ {part.typed}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        record["parts"][part.name] = measured(part, rehearsal, folder, start)
        write_whole(folder / RECORD, as_text(record))
        print(f"{part.name}: {told(record['parts'][part.name])}", flush=True)
    record |= compared(record["parts"], plan) | {"disk": bytes_in(folder)}
    record["drawn"] = read_json(folder / DRAWN / "drawn.json")
    write_whole(folder / RECORD, as_text(record))
    return write_whole(folder / PAGE, page(record, folder))


def opened(file: Path, rehearsal: Rehearsal) -> dict:
    """The record so far; a new one where there is none. Raises SprintError."""
    commands = [part.typed for part in rehearsal.parts()]
    if not file.exists():
        return {
            "recipe": rehearsal.name,
            "weights": "random: pictures are noise",
            "commands": commands,
            "machine": machine(),
            "parts": {},
        }
    record = read_json(file)
    if record.get("commands") != commands or not isinstance(record.get("parts"), dict):
        raise SprintError(f"{file} is of another rehearsal; give another folder with --out, or delete it")
    return record


def as_text(record: dict) -> str:
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def machine() -> dict:
    """Where it runs, without names of this machine's own."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    total = psutil.virtual_memory().total
    return {
        "machine": f"{os.cpu_count()} cores {processor()}, {memory(total)}, {gpu}",
        "versions": {k: v for k, v in environment().items() if k != "device"},
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine()).replace("(R)", "")


# ---- room -------------------------------------------------------------------------------------------


def plan_of(rehearsal: Rehearsal) -> Plan:
    """Of one process, whatever the recipe's engine: it has nobody to share with."""
    return dry_run(with_engine(rehearsal.real, EngineKind.single, shard_teacher=False))


def planned(plan: Plan) -> dict[str, float]:
    """Bytes by stage, with activation checkpointing if the recipe has it."""
    kept = not plan.recipe.activation_checkpointing
    found = {}
    for stage in plan.stages:
        totals = totals_of(stage.memory[1])
        found[stage.name] = totals.kept if kept else totals.recomputed
    return found


def on_disk(plan: Plan) -> int:
    """Bytes: the random teacher, the adapted one, stage 2's checkpoint (weights and as much state) and the student."""
    teacher, adapted, student, *heads = plan.parameters.values()
    return BF16 * teacher + FP32 * (adapted + 3 * student + 2 * sum(heads))


def check_room(plan: Plan, folder: Path) -> None:
    """Raises SprintError, in one line, where the plan does not fit."""
    need = max(planned(plan).values()) * (1 + SPARE)
    if torch.cuda.is_available():
        where, free = "GPU memory", torch.cuda.mem_get_info()[0]
    else:
        where, need, free = "memory", need + LIBRARIES, psutil.virtual_memory().available
    inside = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    disk = (on_disk(plan) + GIB, shutil.disk_usage(inside).free)
    for what, (wanted, there) in {where: (need, free), f"disk at {inside}": disk}.items():
        if there < wanted:
            raise SprintError(
                f"too little {what}: a rehearsal of {plan.recipe.name} needs {memory(wanted)} by the plan, "
                f"{memory(there)} are free; free some, or take a smaller recipe"
            )


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


# ---- a part, and what it took -----------------------------------------------------------------------


def measured(part: Part, rehearsal: Rehearsal, folder: Path, start: Watch) -> dict:
    """Run it.  -> what the record says of it. Raises SprintError where it fails."""
    landmarks = {"adapt": folder / rehearsal.run / "teacher"} if part.name == "distill" else {}
    done = start(part.arguments, folder, landmarks)
    if done.code:
        if done.code == INTERRUPTED:
            raise KeyboardInterrupt
        raise SprintError(
            f"{part.name} ended with code {done.code} after {duration(done.seconds)}, see above; in {folder} it was: "
            f"{part.typed}"
        )
    found = {"what": part.what, "command": part.typed, "seconds": round(done.seconds, 1)}
    found |= {"cpu_seconds": round(done.cpu_seconds, 1), "peak_memory": done.peak_memory}
    if part.name == "distill":
        costs = read_costs(folder / rehearsal.run)
        peaks = {"adapt": done.until.get("adapt"), "distill": done.peak_memory}
        found["stages"] = {
            stage: {"seconds": seconds, "peak_memory": peaks[stage]}
            for stage, seconds in costs.seconds.items()
            if stage in STAGES
        }
        if torch.cuda.is_available():
            found["gpu_memory"] = costs.peak_memory
    return found


def told(found: dict) -> str:
    return f"{duration(found['seconds'])}, at most {memory(found['peak_memory'])}"


def compared(parts: dict, plan: Plan) -> dict:
    """Totals, and stages beside the plan.

    `off` is by how much of the plan the measured exceeds it, the libraries, which no plan counts, taken off.
    """
    libraries, stages = parts["plan"]["peak_memory"], {}
    by_plan = planned(plan)
    for name, took in parts["distill"]["stages"].items():
        expected = by_plan[STAGES[name]]
        on_gpu = parts["distill"].get("gpu_memory") if name == "distill" else None
        held = on_gpu or (took["peak_memory"] and took["peak_memory"] - libraries)
        stages[name] = {
            "planned_memory": round(expected),
            "measured_memory": held,
            "off": held and round(held / expected - 1, 3),
        }
    return {
        "seconds": round(sum(part["seconds"] for part in parts.values()), 1),
        "cpu_seconds": round(sum(part["cpu_seconds"] for part in parts.values()), 1),
        "peak_memory": max(part["peak_memory"] for part in parts.values()),
        "libraries": libraries,
        "stages": stages,
        "planned_disk": on_disk(plan),
    }
