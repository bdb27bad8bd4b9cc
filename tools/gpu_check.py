"""Everything that needs a GPU in one command of at most ten minutes.

    python tools/gpu_check.py
    python tools/gpu_check.py --only training --out training.json

    tests      pytest -m gpu
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
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import diffusers
import torch
import transformers
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor
from tqdm import tqdm

from sprint.data.batch import Batch
from sprint.engine import Engine
from sprint.errors import SprintError
from sprint.files import write_whole
from sprint.log import METRICS, read_metrics
from sprint.models.presets import transformer_config
from sprint.models.view import DENSE_TIME, TrigFlowView
from sprint.recipe import Recipe, load_recipe
from sprint.sample import Noise, sample_consistency
from sprint.schedule import student_times
from sprint.train.distill import DISCRIMINATOR, GENERATOR, DistillStage

ROOT = Path(__file__).resolve().parents[1]
PRESET, TEXT_TOKENS, GUIDANCE = "0.6b", 300, 4.5
PAIRS = 6  # timed updates of the generator, and as many of the discriminator, after one of each
WARMUP_CALLS, TIMED_CALLS = 3, 20
TINY_OVERRIDES = ("adapt.steps=100", "distill.steps=400", "evaluate.prompts=120")
TRAINING_OVERRIDES = ("distill.batch_size=4", "activation_checkpointing=true")

# Sana's autoencoder: AutoencoderDC f32c32, 312,250,275 parameters
STAGE_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
STAGE_CHANNELS = (128, 256, 512, 512, 1024, 1024)
STAGE_SCALES = ((), (), (), (5,), (5,), (5,))
F32C32 = {
    "latent_channels": 32,
    "encoder_block_types": STAGE_BLOCKS,
    "decoder_block_types": STAGE_BLOCKS,
    "encoder_block_out_channels": STAGE_CHANNELS,
    "decoder_block_out_channels": STAGE_CHANNELS,
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": STAGE_SCALES,
    "decoder_qkv_multiscales": STAGE_SCALES,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}


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


def run_tiny(overrides: tuple[str, ...] = TINY_OVERRIDES) -> dict:
    """The tiny recipe, overridden, from teacher to page, in a folder that is then removed."""
    arguments = [str(ROOT / "recipes" / "tiny.yaml"), "name=gpu-check", *overrides]
    recipe = load_recipe(arguments[0], arguments[1:])
    command = ["-c", "from sprint.cli import main; main()", "distill", *arguments]
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


# ---- 0.6B with random weights -----------------------------------------------------------------------


def random_network(preset: str, device: torch.device, student: bool) -> SanaTransformer2DModel:
    """A preset's network as its class initialises it: the adapted teacher's architecture or the student's."""
    torch.manual_seed(0)
    with device:
        return SanaTransformer2DModel(**transformer_config(preset, qk_norm=True, guidance_embeds=student))


def random_text(config: dict, batch_size: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """-> text [B, T, D], mask [B, T] with every token real"""
    text = torch.randn(batch_size, tokens, config["caption_channels"], device=device)
    return text, torch.ones(batch_size, tokens, dtype=torch.int64, device=device)


def latent_shape(config: dict) -> tuple[int, int, int]:
    return config["in_channels"], config["sample_size"], config["sample_size"]


def measure_training(preset: str, recipe: Recipe, pairs: int = PAIRS) -> dict:
    """Time and memory of stage 2's updates by phase, on noise for latents and text.

    preset   an architecture by name, given random weights
    recipe   batch size, precision, optimizers, taps; its teacher and data are not touched
    pairs    timed updates of each phase, after one of each that is not
    """
    engine = Engine(recipe.precision)
    device, size = engine.device, recipe.distill.batch_size
    teacher = random_network(preset, device, student=False)
    shape = latent_shape(teacher.config)
    null = random_text(teacher.config, 1, recipe.text.max_length, device)
    text, mask = random_text(teacher.config, size, recipe.text.max_length, device)
    batch = Batch(torch.randn(size, *shape, device=device), text, mask)
    stage = DistillStage(recipe, engine, teacher, null, shape)
    updates = {GENERATOR: [], DISCRIMINATOR: []}
    for step in tqdm(range(2 * pairs + 2), desc=f"updates of {preset}", leave=False):
        updates[stage.phase(step)].append(timed_update(stage, step, batch))
    return {
        "network": preset,
        "weights": "random",
        "student_parameters": sum(p.numel() for p in stage.student.parameters()),
        "latent": [size, *shape],
        "text": list(text.shape),
        "precision": recipe.precision.value,
        "optimizer": recipe.distill.optimizer.kind.value,
        "activation_checkpointing": recipe.activation_checkpointing,
        "phases": {phase: summary(rows) for phase, rows in updates.items()},
    }


class Update(NamedTuple):
    seconds: float
    peak_bytes: int | None
    loss: float
    skipped: float  # updates without a finite gradient so far


def timed_update(stage: DistillStage, step: int, batch: Batch) -> Update:
    """One update by the clock, the device idle before and after."""
    device = stage.engine.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronise(device)
    began = time.perf_counter()
    means = stage.update(step, batch)
    synchronise(device)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    read = means.read(stage.engine)
    return Update(seconds, peak, read["loss"], read["skipped"])


def summary(updates: list[Update]) -> dict:
    """The first update apart: it fills caches and makes the optimizer's state."""
    first, *timed = updates
    losses = [update.loss for update in updates]
    return {
        "first_update_seconds": round(first.seconds, 4),
        "median_update_seconds": round(statistics.median(update.seconds for update in timed), 4),
        "timed_updates": len(timed),
        "peak_memory_gib": gib(max((update.peak_bytes or 0) for update in timed)) or None,
        "losses": [round(loss, 5) if math.isfinite(loss) else None for loss in losses],
        "losses_finite": all(map(math.isfinite, losses)),
        "skipped_updates": int(updates[-1].skipped),
    }


def measure_sampling(
    preset: str, device: torch.device, dtype: torch.dtype, tokens: int = TEXT_TOKENS, calls: int = TIMED_CALLS
) -> dict:
    """Latency of one picture's latent in one step: noise, one forward, the data estimate. No text encoder."""
    network = random_network(preset, device, student=True).to(dtype).eval()
    config, view = network.config, TrigFlowView(network, DENSE_TIME)
    text, mask = random_text(config, 1, tokens, device)
    F = partial(view, text=text, mask=mask, guidance=torch.full((1,), GUIDANCE, device=device))
    times = student_times(1)

    def sample() -> Tensor:
        return sample_consistency(F, Noise([0], latent_shape(config), device), times)

    latent = sample()
    return {
        "network": preset,
        "weights": "random",
        "dtype": str(dtype).removeprefix("torch."),
        "latent": list(latent.shape),
        "latent_finite": bool(torch.isfinite(latent).all()),
        **latency(sample, device, calls),
    }


def measure_decoder(
    config: dict, cells: int, device: torch.device, dtype: torch.dtype, calls: int = TIMED_CALLS
) -> dict:
    """Latency of one picture from its latent of `cells` a side, random weights."""
    torch.manual_seed(0)
    with device:
        autoencoder = AutoencoderDC(**config).to(dtype).eval()
        latent = torch.randn(1, config["latent_channels"], cells, cells, dtype=dtype)

    @torch.no_grad()
    def decode() -> Tensor:
        return autoencoder.decode(latent / config["scaling_factor"]).sample

    return {
        "weights": "random",
        "decoder_parameters": sum(p.numel() for p in autoencoder.decoder.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "picture": list(decode().shape),
        **latency(decode, device, calls),
    }


def latency(call: Callable[[], Tensor], device: torch.device, calls: int) -> dict:
    """Milliseconds of one call after a warm-up, the device idle before and after each."""
    for _ in range(WARMUP_CALLS):
        call()
    seconds = []
    for _ in range(calls):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    spread = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    figures = {f"{name}_milliseconds": round(1000 * value, 2) for name, value in spread.items()}
    return figures | {"calls": calls}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gib(size: int) -> float:
    return round(size / 2**30, 3)


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
    "tests": Part(110, "the tests marked gpu", run_tests),
    "tiny": Part(220, f"recipes/tiny.yaml with {' '.join(TINY_OVERRIDES)}", run_tiny),
    "training": Part(140, f"updates of {PRESET} at 1024 px, {' '.join(TRAINING_OVERRIDES)}", train_large),
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


def first_line_of(*command: str) -> str:
    """What a program in the checkout prints first; "unknown" where it cannot."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0] or "unknown"


def circumstances() -> dict:
    """Where, when and with what the figures were taken."""
    gpu = torch.cuda.get_device_properties(0)
    return {
        "command": shlex.join(["python", *sys.argv]),
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
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
