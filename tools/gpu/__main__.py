"""Everything that needs a GPU in one command of at most ten minutes.

    python -m tools.gpu
    python -m tools.gpu --only training --out training.json

    tests      pytest -m gpu
    engines    steps under ddp and fsdp2 against one process's, and a checkpoint of each; on two GPUs if there are
    tiny       recipes/tiny.yaml from teacher to page, with fewer steps
    training   updates of generator and discriminator of 0.6B at 1024 px, random weights
    sampling   one-step sampling of 0.6B at 1024 px, random weights, network only
    decoder    the f32c32 autoencoder's decoder at 1024 px, random weights

Each part has its time box; what fails is written down and the rest goes on. One JSON holds device, versions,
commit and figures. Without a GPU the command says what it would do and writes nothing.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import diffusers
import torch
import transformers

from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.models.sana.presets import transformer_config
from sprint.recipe.load import load_recipe
from sprint.train.log import METRICS, read_metrics
from tools.bench.measure import command, first_line_of
from tools.bench.speed import (
    F32C32,
    gib,
    measure_decoder,
    measure_sampling,
    measure_training,
)
from tools.gpu.engines import SHARED_ENGINES, compare_engines

ROOT = Path(__file__).resolve().parents[2]
PRESET = "0.6b"
TINY_OVERRIDES = ("adapt.steps=100", "distill.steps=400", "evaluate.prompts=120")
TRAINING_OVERRIDES = ("distill.batch_size=4", "activation_checkpointing=true")


# ---- parts that are commands of their own -----------------------------------------------------------


def run_python(*arguments: str, folder: Path) -> tuple[int, str]:
    """This interpreter in `folder`, with the package of this checkout.  -> exit code, its output"""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def last_lines(output: str, count: int = 5) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " | ".join(lines[-count:]) or "no output"


def run_tests() -> dict:
    """The tests marked `gpu`. Raises RuntimeError if one fails, one is skipped or there is none."""
    with tempfile.TemporaryDirectory() as folder:
        verdict = Path(folder) / "tests.xml"
        code, output = run_python("-m", "pytest", "-m", "gpu", f"--junitxml={verdict}", folder=ROOT)
        if not verdict.exists():
            raise RuntimeError(f"pytest ended with code {code}: {last_lines(output)}")
        suite = ElementTree.parse(verdict).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    if code != 0 or counts["skipped"]:
        raise RuntimeError(f"pytest ended with code {code}, {counts}: {last_lines(output)}")
    return {"passed": counts["tests"]}


def run_engines(processes: int = 0) -> dict:
    """Each engine in processes of its own, two where there are two GPUs. Raises RuntimeError if one goes astray."""
    processes = processes or min(2, torch.cuda.device_count())
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    with tempfile.TemporaryDirectory() as folder:
        for launcher, kinds in (((), ("single",)), (torchrun, SHARED_ENGINES)):
            code, output = run_python(*launcher, "-m", "tools.gpu.engines", folder, *kinds, folder=ROOT)
            if code != 0:
                raise RuntimeError(f"{', '.join(kinds)} ended with code {code}: {last_lines(output)}")
        found = {file.stem: json.loads(file.read_text()) for file in Path(folder).glob("*.json")}
    return {"processes": processes, "largest_difference": compare_engines(found), "engines": found}


def run_tiny(overrides: tuple[str, ...] = TINY_OVERRIDES) -> dict:
    """The tiny recipe, overridden, from teacher to page, in a folder that is then removed."""
    arguments = [str(ROOT / "recipes" / "tiny.yaml"), "name=gpu-check", *overrides]
    recipe = load_recipe(arguments[0], arguments[1:])
    command = ["-m", "sprint", "distill", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        code, output = run_python(*command, folder=Path(folder))
        if code != 0:
            raise RuntimeError(f"sprint distill ended with code {code}: {last_lines(output)}")
        run = Path(folder) / "runs" / recipe.name
        report = json.loads((run / "report.json").read_text())
        costs = json.loads((run / "costs.json").read_text())
        rows = read_metrics(run / METRICS)
    steps = {"adapt": recipe.adapt.steps, "distill": recipe.distill.steps}
    return {
        "overrides": list(overrides),
        "seconds": costs["seconds"],
        "milliseconds_per_step": {
            stage: round(1000 * costs["seconds"][stage] / count, 2) for stage, count in steps.items() if count
        },
        "peak_memory_gib": gib(costs["peak_memory"]),
        "last_loss": {f"{row['stage']}, {row['phase']}": row["loss"] for row in rows},
        "columns": report["columns"],
    }


# ---- the check --------------------------------------------------------------------------------------


class Part(NamedTuple):
    seconds: int  # time box
    what: str
    run: Callable[[], dict]


def train_large() -> dict:
    return measure_training(PRESET, load_recipe(ROOT / "recipes" / f"{PRESET}.yaml", TRAINING_OVERRIDES))


def sample_large() -> dict:
    return measure_sampling(PRESET, torch.device("cuda"), torch.bfloat16)


def decode_large() -> dict:
    cells = transformer_config(PRESET)["sample_size"]
    return measure_decoder(F32C32, cells, torch.device("cuda"), torch.bfloat16)


PARTS = {
    "tests": Part(100, "the tests marked gpu", run_tests),
    "engines": Part(60, f"steps and a checkpoint under {', '.join(SHARED_ENGINES)}", run_engines),
    "tiny": Part(200, f"recipes/tiny.yaml with {' '.join(TINY_OVERRIDES)}", run_tiny),
    "training": Part(130, f"updates of {PRESET} at 1024 px, {' '.join(TRAINING_OVERRIDES)}", train_large),
    "sampling": Part(60, f"one-step latency of {PRESET} at 1024 px in bf16, network only", sample_large),
    "decoder": Part(50, "latency of the f32c32 decoder at 1024 px in bf16", decode_large),
}


class OutOfTime(Exception):
    """A part did not end within its time box."""


@contextmanager
def time_box(seconds: int) -> Iterator[None]:
    """Raises OutOfTime inside the block when so many seconds are over; main thread only."""

    def stop(number, frame):
        raise OutOfTime(f"not done within {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def run_part(part: Part) -> dict:
    """-> {"seconds", "result"}, or {"seconds", "failure"} with the reason in a line"""
    began = time.monotonic()
    try:
        with time_box(part.seconds):
            outcome = {"result": part.run()}
    except (torch.OutOfMemoryError, SprintError, RuntimeError, OutOfTime) as error:
        outcome = {"failure": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    gc.collect()
    torch.cuda.empty_cache()
    return {"seconds": round(time.monotonic() - began, 1), **outcome}


def circumstances() -> dict:
    """Where, when and with what the figures were taken."""
    gpu = torch.cuda.get_device_properties(0)
    return {
        "command": command(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": first_line_of("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        "device": {
            "name": gpu.name,
            "memory_gib": gib(gpu.total_memory),
            "driver": first_line_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "versions": {
            "python": sys.version.split()[0],
            **{library.__name__: library.__version__ for library in (torch, diffusers, transformers)},
        },
    }


def plan(names: list[str]) -> str:
    """What the command would do, part by part."""
    lines = [f"  {name:10}at most {PARTS[name].seconds:3} s   {PARTS[name].what}" for name in names]
    total = sum(PARTS[name].seconds for name in names)
    return "\n".join([f"no CUDA device here; with one, this would run in at most {total} s:", *lines])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="run this part alone")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "tools" / "results" / "gpu_check.json",
        help="the JSON to write (default tools/results/gpu_check.json)",
    )
    args = parser.parse_args(argv)
    names = [args.only] if args.only else list(PARTS)
    if not torch.cuda.is_available():
        print(plan(names))
        return 0
    record = circumstances() | {"parts": {}}
    for name in names:
        print(f"{name}: {PARTS[name].what}, at most {PARTS[name].seconds} s", flush=True)
        record["parts"][name] = outcome = run_part(PARTS[name])
        write_whole(args.out, json.dumps(record, indent=2) + "\n")
        print(f"{name}: {outcome.get('failure', 'done')} ({outcome['seconds']} s)", flush=True)
    print(args.out)
    return int(any("failure" in outcome for outcome in record["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
