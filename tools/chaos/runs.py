"""Small runs of `sprint distill`: started, watched, killed, and compared with one that nobody disturbed.

Imported by chaos.py and its cases; not a program.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from sprint.base.errors import SprintError
from sprint.train.log import METRICS, read_metrics

ROOT = Path(__file__).resolve().parents[2]
NAME = "chaos"
SETTINGS = [
    f"name={NAME}",
    *("adapt.batch_size=8", "distill.batch_size=8", "distill.adversarial.neighbours=2"),
    "micro_batch_size=2",  # so that gradients accumulate, over 4 parts in one process and over 2 in each of two
    "adapt.start=ones",  # a calibration would take longer than all the steps
    *("log_every=1", "evaluate.prompts=0"),
]
PATIENCE = 300.0  # seconds for anything to happen; a busy machine is slow
LOOK = 0.002  # seconds between two looks


class Size(NamedTuple):
    """Of a run: steps of the two stages, and between checkpoints."""

    adapt: int = 9
    distill: int = 12
    save_every: int = 3

    @property
    def rows(self) -> int:
        """Lines of metrics.jsonl at the end: every step is logged."""
        return self.adapt + self.distill

    @property
    def settings(self) -> list[str]:
        stages = [f"adapt.steps={self.adapt}", f"distill.steps={self.distill}"]
        return [*stages, f"save_every={self.save_every}"]


class Stuck(Exception):
    """Something that should happen did not."""


def until(true: Callable[[], bool], what: str, seconds: float = PATIENCE) -> float:
    """Wait for it.  -> seconds that took.  Raises Stuck."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > seconds:
            raise Stuck(f"{what}: not within {seconds:.0f} s")
        time.sleep(LOOK)
    return time.monotonic() - began


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment() -> dict[str, str]:
    """One thread a process, since sums keep their order then, and no GPU."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


# ---- processes --------------------------------------------------------------------------------------


class Process(NamedTuple):
    """One that the zygote has forked."""

    pid: int
    output: Path

    @property
    def end(self) -> dict | None:
        """{"code", "cpu_seconds"} once it has ended"""
        file = Path(f"{self.output}.end")
        return json.loads(file.read_text()) if file.exists() else None

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Zygote:
    """tools.chaos.zygote at work; a context manager that leaves no process behind.

    cpu_seconds   of what it forked and has ended
    """

    def __init__(self):
        self._forked: list[Process] = []

    def __enter__(self) -> "Zygote":
        command = [sys.executable, "-m", "tools.chaos.zygote"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._popen = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True, **pipes)
        return self

    def __exit__(self, *exception) -> None:
        self._popen.communicate()  # closes its input

    def fork(self, arguments: list[str], folder: Path, ranks: dict, largest_file: int) -> Process:
        """`sprint ARGUMENTS` in `folder`; what it says goes to a file beside that.

        ranks          what a launcher puts into the environment
        largest_file   bytes beyond which a write fails; 0: no such limit
        """
        folder.mkdir(parents=True, exist_ok=True)
        output = folder.with_name(f"{folder.name}.{len(self._forked):03d}")
        order = {"argv": arguments, "folder": str(folder), "environment": ranks, "output": str(output)}
        print(json.dumps(order | {"largest_file": largest_file}), file=self._popen.stdin, flush=True)
        answer = self._popen.stdout.readline()
        if not answer:
            raise SprintError("python -m tools.chaos.zygote has ended; run it alone to see why")
        self._forked.append(Process(int(answer), output))
        return self._forked[-1]

    @property
    def cpu_seconds(self) -> float:
        return sum(process.end["cpu_seconds"] for process in self._forked if process.end)


# ---- runs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """`sprint distill` of the small recipe in a folder of its own. The same command again resumes it."""

    folder: Path
    size: Size
    processes: int = 1
    extra: tuple[str, ...] = ()

    @property
    def run(self) -> Path:
        return self.folder / "runs" / NAME

    @property
    def arguments(self) -> list[str]:
        engine = ["engine=ddp"] if self.processes > 1 else []
        return [
            "distill",
            str(ROOT / "recipes" / "tiny.yaml"),
            *SETTINGS,
            *self.size.settings,
            *engine,
            *self.extra,
        ]

    def in_shell(self, restarts: int = 0) -> list[str]:
        """As a person would type it, with torchrun for several processes."""
        if self.processes == 1:
            return [sys.executable, "-m", "sprint", *self.arguments]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        launch += [f"--max-restarts={restarts}"]
        return [sys.executable, *launch, "-m", "sprint", *self.arguments]

    def rows(self) -> int:
        """Lines of metrics.jsonl."""
        file = self.run / METRICS
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        return sorted((self.run / "checkpoints").glob("*/[0-9]*"), key=lambda path: path.name, reverse=True)


class Life:
    """A command at work, from its start to its end or to a kill; one process a rank."""

    def __init__(self, zygote: Zygote, command: Command, largest_file: int = 0):
        self.command, self.began, self._born = command, time.monotonic(), time.time()
        metrics = command.run / METRICS
        self._before = open(metrics) if metrics.exists() else None  # noqa: SIM115 (so that its inode stays taken)
        size, port = command.processes, free_port()
        self.ranks = []
        for rank in range(size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            ranks = {key: str(value) for key, value in place.items()} if size > 1 else {}
            self.ranks.append(zygote.fork(command.arguments, command.folder, ranks, largest_file))

    def rows(self) -> int:
        """Lines of the log since this life has opened it; 0 before."""
        metrics = self.command.run / METRICS
        if self._before and os.path.samestat(os.stat(metrics), os.fstat(self._before.fileno())):
            return 0
        return self.command.rows()

    def writing(self) -> bool:
        """A checkpoint of this life is in the making."""
        found = (self.command.run / "checkpoints").glob("*/.writing-*")
        return any(_made(path) >= self._born for path in found)

    def exporting(self) -> bool:
        return any(_made(path) >= self._born for path in self.command.run.glob(".*.part"))

    @property
    def ended(self) -> bool:
        return all(process.end for process in self.ranks)

    def codes(self, seconds: float = PATIENCE) -> list[int]:
        """Of all ranks, once they have ended. Raises Stuck."""
        until(lambda: self.ended, "the end of the run", seconds)
        return [process.end["code"] for process in self.ranks]

    def said(self, rank: int = 0) -> str:
        return self.ranks[rank].output.read_text(errors="replace")

    def kill(self, ranks: Iterable[int] = ()) -> None:
        """SIGKILL to these ranks, or to all, one right after the other."""
        for rank in ranks or range(len(self.ranks)):
            self.ranks[rank].signal(signal.SIGKILL)

    def wait_for(self, row: int) -> bool:
        """Until so many lines are logged.  -> False if the run ended before.  Raises Stuck."""
        until(lambda: self.rows() >= row or self.ended, f"line {row} of the log")
        return not self.ended


def _made(path: Path) -> float:
    """When a folder was made or last changed; 0 if it has just gone."""
    try:
        return path.stat().st_ctime
    except FileNotFoundError:
        return 0.0


# ---- moments ----------------------------------------------------------------------------------------


class Tempo(NamedTuple):
    """What an undisturbed run took, in seconds, so that moments can be drawn over all of its life.

    gaps   from row k of the log to row k + 1; the first from the start, the last to the end
    save   a checkpoint in the making
    """

    gaps: list[float]
    save: float

    @classmethod
    def of(cls, life: Life) -> "Tempo":
        """Watches until the end. Raises Stuck."""
        seen, saving = [life.began], 0.0
        size = life.command.size
        saves = -(-size.adapt // size.save_every) - (-size.distill // size.save_every)
        last = time.monotonic()
        while not life.ended:
            now = time.monotonic()
            if now - life.began > PATIENCE:
                raise Stuck(f"an undisturbed run: not within {PATIENCE:.0f} s")
            seen += [now] * (life.rows() + 1 - len(seen))
            saving += (now - last) * life.writing()
            last = now
            time.sleep(LOOK)
        seen.append(time.monotonic())
        return cls([b - a for a, b in pairwise(seen)], saving / saves)


class Moment(NamedTuple):
    """When to strike.

    row     lines of the log that must be there
    share   of the time that the undisturbed run spent between this line and the next; of a save, if `saving`
    saving  wait for a checkpoint in the making first
    rank    whom; None: all at once
    """

    row: int
    share: float
    saving: bool = False
    rank: int | None = None

    def __str__(self) -> str:
        place = "the next save" if self.saving else f"step {self.row} to {self.row + 1}"
        return f"{self.share:.0%} of {place}"


def reach(life: Life, moment: Moment, tempo: Tempo) -> bool:
    """Wait for the moment, at most until what it falls into is over.  -> False if the run ended before.

    Raises Stuck.
    """
    life.wait_for(moment.row)
    if moment.saving:
        until(lambda: life.writing() or life.ended, "a save")
    seconds = moment.share * (tempo.save if moment.saving else tempo.gaps[moment.row])
    began = time.monotonic()
    over = (lambda: not life.writing()) if moment.saving else (lambda: life.rows() > moment.row)
    until(lambda: time.monotonic() - began >= seconds or over() or life.ended, "a moment")
    return not any(process.end for process in life.ranks)


def struck(life: Life) -> str:
    """Where a kill has hit, by what it left."""
    rows = life.command.rows()
    if life.rows() == 0:
        text = "starting" + (f" (step {rows} was logged)" if rows else "")
    else:
        last = read_metrics(life.command.run / METRICS)[-1]
        text = f"{last['stage']} step {last['step']} logged"
        text += {life.command.size.adapt: ", handing over", life.command.size.rows: ", ending"}.get(rows, "")
    return (
        text + ", a checkpoint half written" * life.writing() + ", an export half written" * life.exporting()
    )
