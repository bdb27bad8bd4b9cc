"""A command run as its own process, with the time it takes and the most memory it holds."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
EVERY = 0.1  # seconds between two looks


class Watched(NamedTuple):
    """code         as the process ended
    seconds         of wall clock
    cpu_seconds     of all its threads; fewer than seconds · cores where it waited, or others were at work
    peak_memory     bytes resident at the highest point; the last tenth of a second may be missing
    until           the same up to the moment when a file or folder first was there, by the name it was asked under
    """

    code: int
    seconds: float
    cpu_seconds: float
    peak_memory: int
    until: dict[str, int]


def watch(arguments: Sequence[str], folder: Path, landmarks: Mapping[str, Path] | None = None) -> Watched:
    """This interpreter in `folder`, with the package of this checkout; what it prints goes where ours goes.

    An interruption (Ctrl-C reaches the process too) is raised once the process has ended.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    began, cpu, peak, until = time.monotonic(), of_children(), 0, {}
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=os.environ | {"PYTHONPATH": path}
    )
    try:
        while process.poll() is None:
            for name, place in (landmarks or {}).items():
                if name not in until and place.exists():
                    until[name] = peak
            peak = max(peak, high_water(process.pid))
            time.sleep(EVERY)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    seconds = time.monotonic() - began
    return Watched(process.returncode, seconds, of_children() - cpu, peak, until)


def of_children() -> float:
    """CPU seconds of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def high_water(pid: int) -> int:
    """Bytes that a process has held at most; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
