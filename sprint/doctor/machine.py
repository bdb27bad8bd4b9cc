"""This machine beside what a recipe needs: processors, GPUs, memory, disk, packages, processes, accounts."""

import netrc
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from packaging.requirements import Requirement

from sprint.doctor.findings import Finding, note, ok, wrong
from sprint.recipe.schema import EngineKind, Precision, Recipe
from sprint.recipe.shares import misfits

PACKAGE = "sprint-distill"
WANDB_HOST = "api.wandb.ai"
LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets them
COMPILERS = ("c++", "g++", "clang++", "gcc", "cc", "clang")
KEPT = 3  # checkpoints on disk at once: two that stay and one in the making
GIB = 2**30
SPARE = 0.1  # of a GPU, for workspace and fragmentation


class Needs(NamedTuple):
    """Bytes that a recipe takes: of one process while it trains, and on disk in a checkpoint and an export."""

    memory: float
    checkpoint: float
    export: float


class Machine(NamedTuple):
    """gpus   bytes of each"""

    cores: int
    memory: int
    available: int
    gpus: Sequence[int]
    gpu_name: str = ""

    @classmethod
    def this(cls) -> "Machine":
        memory, gpus = psutil.virtual_memory(), []
        if torch.cuda.is_available():
            gpus = [
                torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())
            ]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name = torch.cuda.get_device_name(0) if gpus else ""
        return cls(cores or 1, memory.total, memory.available, gpus, name)


def examine_machine(recipe: Recipe, needs: Needs | None, folder: Path, machine: Machine) -> list[Finding]:
    """needs   None where no plan could be made
    folder  of the run
    """
    findings = [*_processors(machine), *packages(recipe), *processes(recipe, machine, dict(os.environ))]
    if needs:
        findings += [memory(recipe, needs, machine), disk(needs, folder)]
    return findings + _tools(recipe) + wandb_login(recipe, dict(os.environ))


def _processors(machine: Machine) -> list[Finding]:
    text = f"{machine.cores} CPU cores, {_gib(machine.memory)} of memory, {_gib(machine.available)} free"
    if machine.gpus:
        gpus = f"{len(machine.gpus)} × {machine.gpu_name}, {_gib(min(machine.gpus))} each"
        return [ok("machine", f"{text}; {gpus}")]
    return [ok("machine", f"{text}; no GPU that PyTorch sees (torch {torch.__version__})")]


# ---- what it takes ------------------------------------------------------------------------------------


def memory(recipe: Recipe, needs: Needs, machine: Machine) -> Finding:
    """The plan of one process, against a GPU or the machine's memory."""
    there = (1 - SPARE) * min(machine.gpus) if machine.gpus else machine.available
    place = "a GPU" if machine.gpus else "the memory that is free, without a GPU"
    text = f"the plan needs {_gib(needs.memory)} for one process, {place} has {_gib(there)}"
    if needs.memory > there:
        return wrong(
            "memory",
            text,
            "lower micro_batch_size, set activation_checkpointing=true, take more GPUs with engine=fsdp2, or a "
            "smaller teacher; --dry-run tells what each would need",
        )
    if not machine.gpus and recipe.precision is Precision.bf16:
        return note(
            "memory", text, "a recipe in bf16 is meant for GPUs: `sprint distill tiny` is made for a CPU"
        )
    return ok("memory", text)


def disk(needs: Needs, folder: Path) -> Finding:
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free, wanted = shutil.disk_usage(place).free, KEPT * needs.checkpoint + needs.export
    text = f"{KEPT} checkpoints and both exports take {_gib(wanted)}, {place} has {_gib(free)} free"
    if wanted > free:
        return wrong("disk", text, "make room, or run it in a folder on a larger disk")
    return ok("disk", text)


# ---- packages -----------------------------------------------------------------------------------------


def packages(recipe: Recipe, declared: Sequence[str] | None = None) -> list[Finding]:
    """Installed versions against what the package declares, with the extras that the recipe takes."""
    try:
        declared = requires(PACKAGE) or [] if declared is None else declared
    except PackageNotFoundError:
        return [note("packages", f"{PACKAGE} is not installed here", "pip install -e . in its repository")]
    extras, wanting, installed = {"", *_extras(recipe)}, [], 0
    for requirement in map(Requirement, declared):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        try:
            there = version(requirement.name)
        except PackageNotFoundError:
            wanting.append(f"{requirement.name} is missing")
            continue
        installed += 1
        if not requirement.specifier.contains(there, prereleases=True):
            wanting.append(f"{requirement.name} {there} is not {requirement.specifier}")
    if wanting:
        with_extras = f"[{','.join(sorted(extras - {''}))}]" if extras - {""} else ""
        return [wrong("packages", "; ".join(wanting), f"pip install '{PACKAGE}{with_extras}'")]
    python = ".".join(map(str, sys.version_info[:3]))
    return [ok("packages", f"Python {python}, torch {torch.__version__}, and {installed} as declared")]


def _extras(recipe: Recipe) -> list[str]:
    """Of the package, those without which the recipe stops."""
    zero = recipe.engine in (EngineKind.zero2, EngineKind.zero3)
    wanted = {
        "cluster": zero,
        "data": recipe.data.kind.value == "huggingface",
        "track": recipe.wandb,
        "eval": recipe.evaluate.prompts > 0 and recipe.data.kind.value == "scenes",
    }
    return [name for name, needed in wanted.items() if needed]


def _tools(recipe: Recipe) -> list[Finding]:
    if not recipe.compile:
        return []
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    if found is None:
        return [
            wrong(
                "compiler",
                "compile = true, and no C++ compiler is there",
                "install g++, or set compile=false",
            )
        ]
    return [ok("compiler", found)]


# ---- processes and accounts ---------------------------------------------------------------------------


def processes(recipe: Recipe, machine: Machine, variables: dict[str, str]) -> list[Finding]:
    """How many will run, as torchrun's variables say, and whether the batches divide."""
    world = variables.get("WORLD_SIZE", "")
    if world and not world.isdecimal():
        return [
            wrong("processes", f"WORLD_SIZE = {world!r} is no number", "unset it, or start with torchrun")
        ]
    count = int(world or 1)
    lacking = [name for name in LAUNCHERS if name not in variables]
    if count > 1 and lacking:
        return [
            wrong(
                "processes",
                f"WORLD_SIZE = {count}, but {', '.join(lacking)} {'are' if len(lacking) > 1 else 'is'} not set",
                f"start with torchrun --nproc-per-node {count}, or unset WORLD_SIZE: alone it waits for the others",
            )
        ]
    findings = [
        wrong("processes", problem, "change the batch size, or take another number of processes")
        for problem in misfits(recipe, max(count, 1))
    ]
    gpus = len(machine.gpus)
    start = f"torchrun --nproc-per-node {gpus} -m sprint distill …"
    if gpus > 1 and count == 1:
        engine = recipe.engine.value
        also = " and an engine of several (engine=ddp or fsdp2)" if engine == "single" else ""
        findings.append(note("processes", f"one, on one of {gpus} GPUs", f"for all of them {start}{also}"))
    elif count > 1 and recipe.engine is EngineKind.single:
        text = f"{count} processes, but engine = single is one"
        findings.append(wrong("processes", text, "set engine=ddp or fsdp2"))
    return findings or [ok("processes", f"{count}, engine {recipe.engine.value}")]


def wandb_login(recipe: Recipe, variables: dict[str, str]) -> list[Finding]:
    mode = variables.get("WANDB_MODE", "offline")
    if not recipe.wandb:
        return []
    if mode != "online":
        return [ok("wandb", f"{mode}: nothing is sent")]
    if variables.get("WANDB_API_KEY") or _key_in_netrc(variables):
        return [ok("wandb", "online, a key is there")]
    return [
        wrong(
            "wandb",
            "WANDB_MODE = online, but there is no key",
            "wandb login, or WANDB_API_KEY=…, or WANDB_MODE=offline",
        )
    ]


def _key_in_netrc(variables: dict[str, str]) -> bool:
    """Whether the file has an entry for the host; the key itself is not looked at."""
    file = Path(variables.get("NETRC", Path.home() / ".netrc"))
    try:
        return WANDB_HOST in netrc.netrc(str(file)).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
