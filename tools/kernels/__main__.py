"""The numeric tests under the kernels of other processors, and with another number of threads.

    python -m tools.kernels [--quick] [--jobs 2] [--only NAME ...] [--modules NAME ...]

ATen, oneDNN and MKL choose their kernels by processor; the environment makes each choose those of a smaller one.
Numeric is a test module that says how far numbers may lie apart: one that imports tests.tolerance. A variant whose
kernels compute the same bits as this machine's own shows nothing here, and the table says so.
Exit code 1 if a test fails in any variant, 2 on wrong input.

The same command again resumes: a variant that was green for the same code, modules and processor is not run twice
(runs/kernels.json; without that file all are).
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple
from xml.etree import ElementTree

from sprint.base.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "runs" / "kernels.json"
LEAST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
VARIANTS = {
    "as it is": {},
    "two threads": {"SPRINT_TEST_THREADS": "2", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    "aten default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "onednn sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "onednn avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "mkl compatible": {"MKL_CBWR": "COMPATIBLE"},
    "the least of all": LEAST,
}
QUICK = ("the least of all", "two threads")
QUICK_MODULES = ("test_tolerance", "test_view", "test_text_memory", "test_distill_state")
# A hash of what each operation gives, in one line; the numbers that go in are the same in every variant.
PROBE = """
import hashlib, os, torch
torch.set_num_threads(int(os.environ.get("SPRINT_TEST_THREADS", "1")))
x = (torch.arange(2**15) * 7919 % 1009 / 1009 - 0.5).view(64, 512)
h, picture, weight = x.bfloat16(), x.view(1, 32, 32, 32), x.flatten()[: 8 * 32 * 9].view(8, 32, 3, 3)
found = {
    "sum": x.sum(1), "exp": x.exp(), "layer norm": torch.layer_norm(x, (512,)), "softmax": x.softmax(1),
    "product": x @ x.T, "bf16 product": h @ h.T,
    "convolution": torch.conv2d(picture, weight),
}
print(*(f"{name}={hashlib.sha256(y.float().numpy().tobytes()).hexdigest()}" for name, y in found.items()), sep=";")
"""


class Result(NamedTuple):
    """What a variant gave: counts of tests, names of failed ones, seconds, and what pytest printed."""

    tests: int
    skipped: int
    failed: list[str]
    seconds: float
    said: str


def numeric_modules(names: Sequence[str] = ()) -> list[Path]:
    """Test modules that import tests.tolerance; of `names` alone where there are any.

    Raises ValueError for a name that none has.
    """
    found = sorted(
        file
        for file in (ROOT / "tests").rglob("test_*.py")
        if "from tests.tolerance import" in file.read_text()
    )
    missing = set(names) - {file.stem for file in found}
    if missing:
        raise ValueError(f"no numeric test module {', '.join(sorted(missing))}")
    return [file for file in found if not names or file.stem in names]


def environment(variant: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in LEAST}
    return own | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | VARIANTS[variant]


def bits(variant: str) -> dict[str, str]:
    """By operation: a hash of its result under that variant's kernels."""
    command = [sys.executable, "-c", PROBE]
    line = subprocess.run(
        command, env=environment(variant), capture_output=True, text=True, check=True
    ).stdout
    return dict(pair.split("=") for pair in line.strip().split(";"))


def run(variant: str, modules: Sequence[Path]) -> Result:
    """The tests of `modules` in one process of pytest under that variant."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            f"--junitxml={report}",
        ]
        command += map(str, modules)
        # torch keeps compiled code by graph, not by what ATEN_CPU_CAPABILITY lets it use
        own = environment(variant) | {"TORCHINDUCTOR_CACHE_DIR": folder}
        before = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
        seconds = time.perf_counter() - before
        if not report.exists():
            return Result(0, 0, [f"pytest ended with {done.returncode}"], seconds, done.stdout + done.stderr)
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    if done.returncode and not names:
        names = [f"pytest ended with {done.returncode}"]
    return Result(len(cases), sum(c.find("skipped") is not None for c in cases), names, seconds, done.stdout)


class Kept:
    """Green results of this code, these modules and this processor, on disk from the moment they are there."""

    def __init__(self, file: Path, modules: Sequence[Path], own: dict[str, str]):
        self.file, self.lock = file, Lock()
        tested = [path for part in ("sprint", "tests", "recipes") for path in (ROOT / part).rglob("*")]
        words = [f"{path.relative_to(ROOT)} {_digest(path)}" for path in sorted(tested) if _counts(path)]
        words += [*map(str, modules), json.dumps(own)]
        self.of = hashlib.sha256("\n".join(words).encode()).hexdigest()
        found = json.loads(file.read_text()) if file.exists() else {}
        rows = found["results"] if found.get("of") == self.of else {}
        self.results = {name: Result(*row) for name, row in rows.items()}

    def add(self, variant: str, result: Result) -> None:
        if result.failed:
            return
        with self.lock:
            self.results[variant] = result._replace(said="")
            self.file.parent.mkdir(exist_ok=True)
            write_whole(self.file, json.dumps({"of": self.of, "results": self.results}, indent=1))


def _counts(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def table(results: dict[str, Result], others: dict[str, list[str]]) -> str:
    lines = [
        "",
        f"{'variant':<18}{'tests':>7}{'skipped':>9}{'failed':>8}{'seconds':>9}  other bits than this machine's own",
    ]
    for name, result in results.items():
        counts = f"{result.tests:>7}{result.skipped:>9}{len(result.failed):>8}{result.seconds:>9.0f}"
        lines.append(f"{name:<18}{counts}  {', '.join(others[name]) or 'none'}")
    lines += [f"FAILED under {name}: {case}" for name, result in results.items() for case in result.failed]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="two variants, a few quick modules: about a minute"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="variants at a time (1)")
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, metavar="NAME", help=f"of {', '.join(VARIANTS)}"
    )
    parser.add_argument("--modules", nargs="+", default=(), metavar="NAME", help="test modules, as test_view")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: at least 1")
    try:
        modules = numeric_modules(args.modules or (QUICK_MODULES if args.quick else ()))
    except ValueError as error:
        parser.error(str(error))
    names = args.only or (QUICK if args.quick else VARIANTS)
    own = bits("as it is")
    others = {name: [key for key, value in bits(name).items() if value != own[key]] for name in names}
    kept, results = Kept(KEPT, modules, own), {}

    def result_of(name: str) -> Result:
        if name not in kept.results:
            result = run(name, modules)
            kept.add(name, result)
            return result
        return kept.results[name]

    with ThreadPoolExecutor(args.jobs) as pool:
        for name, result in zip(names, pool.map(result_of, names), strict=True):
            results[name] = result
            print(
                f"{name}: {result.tests} tests, {len(result.failed)} failed, {result.seconds:.0f} s",
                flush=True,
            )
            if result.failed:
                print(result.said)
    print(table(results, others))
    return int(any(result.failed for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
