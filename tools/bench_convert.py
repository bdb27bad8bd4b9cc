"""Measure `sprint convert --verify fast` against `cp`: speed on the same disk, and peak memory.

    python tools/bench_convert.py --size 0.6b --folder /big/disk --repeat 3

Converts a random checkpoint in a process of its own, so that peak memory is its own; needs about four times
the checkpoint's size on the disk, and removes everything afterwards.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_random_checkpoint import write_random_checkpoint

from sprint.convert.convert import DTYPES
from sprint.models.presets import PRESETS

CONVERT = """
import json, resource, sys, time
from sprint.convert.convert import convert
start = time.perf_counter()
convert(sys.argv[1], sys.argv[2], verify=sys.argv[3], progress=False)
seconds = time.perf_counter() - start
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


def time_copy(source: Path, target: Path) -> float:
    """Seconds that `cp` takes."""
    start = time.perf_counter()
    subprocess.run(["cp", source, target], check=True)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def time_convert(source: Path, target: Path, verify: str) -> tuple[float, float]:
    """Seconds of `convert`, imports not counted, and the process's peak resident bytes, all counted."""
    command = [sys.executable, "-c", CONVERT, source, target, verify]
    seconds, peak = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    shutil.rmtree(target)
    return seconds, peak


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
        size = source.stat().st_size
        pairs = [
            (
                time_copy(source, Path(folder) / "copy"),
                *time_convert(source, Path(folder) / "out", args.verify),
            )
            for _ in range(args.repeat)
        ]
    copies, conversions, peaks = zip(*pairs, strict=True)
    copy, conversion = statistics.median(copies), statistics.median(conversions)
    print(f"checkpoint   {size / 1e9:.2f} GB, {args.size} {args.dtype}, {args.repeat} repeats, medians")
    print(f"cp           {copy:.2f} s, {size / copy / 1e9:.2f} GB/s")
    print(f"convert      {conversion:.2f} s, {size / conversion / 1e9:.2f} GB/s, --verify {args.verify}")
    print(f"speed        {copy / conversion:.2f} of cp (at least 0.33 wanted)")
    print(f"peak memory  {max(peaks) / 1e9:.2f} GB (below 1.5 GB wanted)")


if __name__ == "__main__":
    main()
