"""One case: a command on a mutated file, in a process of its own, and what came of it."""

import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import sprint.cli.main

SECONDS, BYTES = 20.0, 2**30  # what a case may take
ROOM = 6 * 2**30  # of addresses above what is mapped, so that a case that takes all ends alone
OPENED, REFUSED = "opened", "refused"
TRACEBACK, HANG, MEMORY, LEFT, RAN = "traceback", "hang", "memory", "left behind", "ran code"
BAD = (TRACEBACK, HANG, MEMORY, LEFT, RAN)


@dataclass(frozen=True)
class Outcome:
    """said: the last line of standard error. seconds, and bytes on top of what a process has before it begins."""

    kind: str
    said: str
    seconds: float
    bytes: int


def run(argv: list[str], folder: Path, output: Path, keeps: tuple[str, ...] = ()) -> Outcome:
    """`sprint ARGV` in `folder`; its words go to the file `output`.

    keeps   beginnings of the paths that it may leave after a refusal, since the same command goes on with them

    A fork of this process, which has imported everything, in a session of its own.
    """
    before = {path.relative_to(folder) for path in folder.rglob("*")}
    began = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(
            writing, _resident().to_bytes(8, "little")
        )  # less than ours: pages of files are not inherited
        _be_the_command(argv, folder, output)
    base = int.from_bytes(os.read(reading, 8), "little")
    os.close(reading)
    os.close(writing)
    code, usage = _wait(child, began + SECONDS)
    seconds, taken = time.monotonic() - began, max(0, usage.ru_maxrss * 1024 - base)
    said = output.read_text(errors="replace")
    lines = said.strip().splitlines() or [""]
    new = {path.relative_to(folder) for path in folder.rglob("*")} - before
    left = [path for path in new if not str(path).startswith(keeps)]
    return Outcome(_kind(code, said, taken, left), lines[-1][:300], seconds, taken)


def _kind(code: int, said: str, taken: int, left: list[Path]) -> str:
    if any(path.name == "RAN" for path in left):
        return RAN
    if code == -signal.SIGKILL:
        return HANG
    if taken > BYTES:
        return MEMORY
    if code not in (0, 2) or "Traceback" in said:
        return TRACEBACK
    if code == 2 and left:
        return LEFT
    return OPENED if code == 0 else REFUSED


def _be_the_command(argv: list[str], folder: Path, output: Path) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        resource.setrlimit(resource.RLIMIT_AS, (_mapped() + ROOM,) * 2)
        sprint.cli.main.main(argv)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, until: float) -> tuple[int, resource.struct_rusage]:
    """-> exit code, or minus the signal that ended it; it is killed when the time is up."""
    while time.monotonic() < until:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage


def _resident() -> int:
    return _pages(1)


def _mapped() -> int:
    return _pages(0)


def _pages(field: int) -> int:
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()
