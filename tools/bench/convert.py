"""Measure `sprint convert --verify fast` against `cp`: speed on the same disk, and peak memory.

    python -m tools.bench.convert --size 0.6b --folder /big/disk --repeat 3

Converts a random checkpoint in a process of its own, so that peak memory is its own: first with the source on
the disk only, then with it in the page cache. Needs about three times the checkpoint's size on the disk, and
removes everything afterwards.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sprint.base.dtypes import DTYPES
from sprint.models.sana.presets import PRESETS
from tools.bench.random_checkpoint import write_random_checkpoint

CONVERT = """
import json, resource, sys, time
from sprint.weights.convert import convert
start = time.perf_counter()
convert(sys.argv[1], sys.argv[2], verify=sys.argv[3], progress=False)
seconds = time.perf_counter() - start
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


def settle(source: Path, cold: bool) -> None:
    """Nothing left to write from before; the source in memory, or only on the disk."""
    os.sync()
    with open(source, "rb", buffering=0) as file:
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while file.read(2**20):
                pass


def time_copy(source: Path, target: Path, cold: bool) -> float:
    """Seconds that `cp` takes."""
    settle(source, cold)
    start = time.perf_counter()
    subprocess.run(["cp", source, target], check=True)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def time_convert(source: Path, target: Path, cold: bool, verify: str) -> tuple[float, float]:
    """Seconds of `convert`, imports not counted, and the process's peak resident bytes, all counted."""
    settle(source, cold)
    command = [sys.executable, "-c", CONVERT, source, target, verify]
    seconds, peak = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    shutil.rmtree(target)
    return seconds, peak


def measure(source: Path, cold: bool, verify: str, repeat: int) -> str:
    """`cp` and `convert` in turns; -> a line of medians."""
    copies, conversions, peaks = [], [], []
    for _ in range(repeat):
        copies.append(time_copy(source, source.parent / "copy", cold))
        seconds, peak = time_convert(source, source.parent / "out", cold, verify)
        conversions.append(seconds)
        peaks.append(peak)
    copy, conversion = statistics.median(copies), statistics.median(conversions)
    return (
        f"{'on disk' if cold else 'in memory':12}{copy:6.2f} s{conversion:11.2f} s{copy / conversion:12.2f}"
        f"{max(peaks) / 1e9:14.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=PRESETS, default="0.6b")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--verify", choices=("fast", "full", "off"), default="fast")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where to write; by default the system's temporary folder"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "random.safetensors"
        write_random_checkpoint(args.size, source, "original", DTYPES[args.dtype])
        size = source.stat().st_size / 1e9
        print(f"{args.size} {args.dtype}, {size:.2f} GB, --verify {args.verify}, medians of {args.repeat}")
        print("source      cp        convert       speed / cp  peak memory")
        for cold in (True, False):
            print(measure(source, cold, args.verify, args.repeat), flush=True)
    print("wanted: speed at least 0.33 of cp, peak memory below 1.5 GB")


if __name__ == "__main__":
    main()
