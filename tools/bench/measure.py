"""Measuring: time as interleaved rounds, memory as the highest point of one call, results as JSON.

Two things are compared within one run, as ratios: a machine's speed drifts, the ratio of neighbours hardly.
Imported by the benchmarks beside it; not a program.
"""

import argparse
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

import diffusers
import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor
from tqdm import tqdm

from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.base.names import BUILT_IN
from sprint.data.batch import Batch
from sprint.engine.engine import Engine
from sprint.models.sana.presets import adapted_config, transformer_config
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Precision, Products

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tools" / "results"
# glibc gives tensors of 64 KiB and more a mapping of their own, which is returned when they are freed
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
Answer = TypeVar("Answer")

diffusers.utils.logging.set_verbosity_error()  # it warns at every cast, of nothing


# ---- time -------------------------------------------------------------------------------------------


def interleaved(
    functions: dict[str, Callable[[], object]], repeats: int = 5, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call, in rounds A B C, A B C, ..., after `warmup` rounds that are not counted.

    Any CUDA work is waited for, before and after each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in tqdm(range(warmup + repeats), desc="rounds", leave=False):
        gc.collect()
        for name, function in functions.items():
            _wait_for_the_device()
            began = time.perf_counter()
            function()
            _wait_for_the_device()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and spread, in the unit given."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """a/b round by round: its median and spread. Raises ValueError for unequal numbers of rounds."""
    return summary([x / y for x, y in zip(a, b, strict=True)])


def _wait_for_the_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# ---- memory -----------------------------------------------------------------------------------------


def peak_memory(code: Callable[[], object]) -> int:
    """Bytes in use at the highest point of one call, above those in use when it starts.

    Where CUDA has been used: what its allocator handed out. Else the process's resident memory, which is only true
    where freed memory goes back at once: call it through `in_fresh_process`.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        code()
        return torch.cuda.max_memory_allocated() - start
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again here (Linux)
    start = _resident("VmRSS")
    code()
    return max(0, _resident("VmHWM") - start)


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def in_fresh_process(
    function: Callable[..., Answer], *arguments: object, variables: Mapping[str, str] = RETURN_AT_ONCE
) -> Answer:
    """function(*arguments) in a new Python with these environment variables.

    By default one that returns freed tensors to the system at once: for memory only, it is slower for it.
    `function` and its arguments are pickled: a module's own function. Raises what the function raises.
    """
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# ---- results ----------------------------------------------------------------------------------------


def environment() -> dict:
    """What the figures depend on: device, processor, threads, versions, commit and command."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu",
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "commit": first_line_of("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        "command": command(),
    }


def command() -> str:
    """The command line of this program, as a person would type it in the checkout."""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
    return shlex.join(["python", *program, *sys.argv[1:]]).replace(f"{ROOT}{os.sep}", "")


def write_results(name: str, results: dict) -> Path:
    """tools/results/NAME.json: the environment, then the results.  -> the file"""
    text = json.dumps({"environment": environment()} | results, indent=2, allow_nan=False)
    return write_whole(RESULTS / f"{name}.json", text + "\n")


def _cpu_model() -> str:
    """The processor's name as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def first_line_of(*command: str) -> str:
    """What a program in the checkout prints first; "unknown" where it cannot."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0] or "unknown"


# ---- what is measured -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A network with random weights, and what goes in. `config` is an adapted teacher's (QK-norm)."""

    config: dict
    taps: tuple[int, ...]
    text_tokens: int
    batch: int

    @property
    def latent(self) -> tuple[int, int, int]:
        return self.config["in_channels"], self.config["sample_size"], self.config["sample_size"]

    def teacher(self, device: torch.device | str = "cpu") -> SanaTransformer2DModel:
        """As its class initialises it, from a fixed seed."""
        torch.manual_seed(0)
        with torch.device(device):
            return SanaTransformer2DModel(**self.config).eval()

    def text(self, batch: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """-> text [B, T, D], mask [B, T] with every token real"""
        text = torch.randn(batch, self.text_tokens, self.config["caption_channels"], device=device)
        return text, torch.ones(batch, self.text_tokens, dtype=torch.int64, device=device)

    def batch_of(self, batch: int, device: torch.device | str = "cpu") -> Batch:
        return Batch(torch.randn(batch, *self.latent, device=device), *self.text(batch, device))


_20M = {
    "num_layers": 12,
    "num_attention_heads": 10,
    "num_cross_attention_heads": 5,
    "cross_attention_head_dim": 64,
    "cross_attention_dim": 320,
    "sample_size": 16,
}
_06B = transformer_config("0.6b", qk_norm=True)


def _built_in() -> Size:
    """The teacher that comes with sprint, adapted; text, taps and batch as its recipe has them."""
    recipe = load_recipe(ROOT / "recipes" / "tiny.yaml")
    config = json.loads((BUILT_IN["tiny"] / "transformer" / "config.json").read_text(encoding="utf-8"))
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    taps, batch = tuple(recipe.distill.adversarial.taps), recipe.distill.batch_size
    return Size(adapted_config(arguments), taps, recipe.text.max_length, batch)


SIZES = {
    "tiny": _built_in(),
    "20m": Size(_06B | _20M, (1, 3, 6, 8), text_tokens=300, batch=8),  # depth 12, width 320, 256 tokens
    "0.6b": Size(_06B, (2, 8, 14, 19), text_tokens=300, batch=32),  # 1024 px
}


class Request(NamedTuple):
    """What one measurement runs on; plain values, since fresh processes get it too."""

    network: str
    batch: int
    device: str
    precision: Precision
    products: Products = Products.exact

    def record(self) -> dict:
        """As results say it."""
        return self._asdict() | {"precision": self.precision.value, "products": self.products.value}


def add_request(parser: argparse.ArgumentParser) -> None:
    """The options that benchmarks share; `requested` reads them."""
    parser.add_argument("--network", choices=SIZES, default="20m", help="random weights (default 20m)")
    parser.add_argument("--batch", type=int, help="pictures (default: 32; 8 for 20m)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=[p.value for p in Precision], default="fp32")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")


def requested(args: argparse.Namespace) -> Request:
    """Raises SprintError for a device that is not there, or nothing to measure."""
    batch = SIZES[args.network].batch if args.batch is None else args.batch
    if batch < 1 or args.rounds < 1:
        raise SprintError(f"--batch {batch} and --rounds {args.rounds}: both must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SprintError("--device cuda: there is no CUDA device here")
    return Request(args.network, batch, args.device, Precision(args.precision))


def engine_of(request: Request) -> Engine:
    """Device, precision and products as a run has them."""
    if request.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else accelerate takes the GPU that is there
    return Engine(request.precision, products=request.products)
