"""Signals: kills at random moments, requests to stop, a rank that dies, a second run in the same folder.

Imported by chaos.py; not a program.
"""

import os
import random
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

from sprint.base.errors import SprintError
from tools.chaos.lab import Lab, Outcome, last_line
from tools.chaos.runs import (
    Command,
    Life,
    Moment,
    Size,
    environment,
    reach,
    struck,
    until,
)

BOUND = 60.0  # seconds in which the others must end when a rank has died; they take a few on an idle machine


# ---- SIGKILL ----------------------------------------------------------------------------------------


def moments_to_kill(numbers: random.Random, count: int, size: Size, processes: int) -> list[Moment]:
    """Over the whole life of a run; where there are enough, also while it starts, saves, hands over and ends.

    With several processes every third one is of a single rank, but for those while it starts and ends.
    """
    starting, saving = count // 7, count // 4
    rows = [numbers.randrange(1, size.rows) for _ in range(count - starting)]
    if starting:
        rows[-2:] = [size.adapt, size.rows]
    moments = []
    for i, row in enumerate(rows):
        alone = processes > 1 and i % 3 == 0 and row < size.rows
        rank = numbers.randrange(processes) if alone else None
        moments.append(Moment(row, numbers.random(), i < saving, rank))
    moments.sort(key=lambda moment: moment[:2])
    for _ in range(starting):
        moments.insert(numbers.randrange(count // 2), Moment(0, numbers.random()))
    return moments


def kills(lab: Lab, outcome: Outcome, processes: int) -> None:
    """SIGKILL, again and again, each time followed by the same command."""
    tempo = lab.reference(processes).tempo
    moments = moments_to_kill(lab.random(outcome.name), lab.kills, lab.size, processes)
    outcome.figures |= {"kills": len(moments), "moments": [list(moment) for moment in moments]}
    command, done, waits = lab.command(processes), 0, []
    while done < len(moments):
        moment, life = moments[done], lab.live(command)
        if not reach(life, moment, tempo):
            codes = life.codes()
            outcome.require(not any(codes), f"{moment}: ended by itself: {last_line(life.said())}")
            if any(codes):
                return
            outcome.compare(command.run, lab.reference(processes).run)  # it was faster than its kill
            command, moments[done] = lab.command(processes), moment._replace(share=moment.share / 2)
            continue
        whom = "" if processes == 1 else ", all at once"
        if moment.rank is None:
            life.kill()
            life.codes()
        else:
            waits.append(seconds_alone(life, moment.rank))
            said = last_line(life.said(1 - moment.rank))
            outcome.require(1 not in life.codes(), f"the other ended with a traceback: {said}")
            whom = f", rank {moment.rank} alone, the other ended {waits[-1]:.1f} s later"
        done += 1
        outcome.did(f"kill {done:2}, {moment}: {struck(life)}{whom}")
    lab.finish(outcome, command)
    if waits:
        outcome.figures["survivor_seconds"] = {"median": median(waits), "max": max(waits)}


def seconds_alone(life: Life, victim: int) -> float:
    """Kill one rank.  -> seconds until the others have ended by themselves.  Raises Stuck."""
    life.kill([victim])
    return until(lambda: life.ended, f"the end of the others after rank {victim} was killed", BOUND)


def kills_of_one(lab: Lab, outcome: Outcome) -> None:
    """SIGKILL at random moments, each time followed by the same command; one process."""
    kills(lab, outcome, 1)


def kills_of_two(lab: Lab, outcome: Outcome) -> None:
    """SIGKILL at random moments to two processes with engine=ddp, now to both and now to one."""
    kills(lab, outcome, 2)


# ---- the real command line ----------------------------------------------------------------------------


class Shell:
    """A command as a person types it: a process, or torchrun's agent and its workers."""

    def __init__(self, command: Command, restarts: int = 0):
        command.folder.mkdir(parents=True, exist_ok=True)
        self.command, self.output = command, command.folder.with_name(f"{command.folder.name}.shell")
        with open(self.output, "w") as output:
            self._popen = subprocess.Popen(
                command.in_shell(restarts),
                cwd=command.folder,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def __enter__(self) -> "Shell":
        return self

    def __exit__(self, *exception) -> None:
        self.kill()

    def workers(self) -> dict[int, int]:
        """Rank -> process id, of torchrun."""
        found = {}
        for children in Path(f"/proc/{self._popen.pid}/task").glob("*/children"):
            for child in children.read_text().split():
                with suppress(OSError):
                    text = Path(f"/proc/{child}/environ").read_text(errors="replace")
                    if rank := re.search(r"(?:^|\0)RANK=(\d+)", text):
                        found[int(rank[1])] = int(child)
        return found

    def wait_for(self, row: int) -> None:
        """Raises Stuck, SprintError if it ends first."""
        until(lambda: self.command.rows() >= row or self._popen.poll() is not None, f"line {row} of the log")
        if self._popen.poll() is not None:
            raise SprintError(f"ended by itself with {self._popen.returncode}: {last_line(self.said())}")

    def kill(self, rank: int | None = None) -> None:
        """One worker, or everything."""
        workers = self.workers()
        for pid in [workers[rank]] if rank is not None else [self._popen.pid, *workers.values()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if rank is None:
            self._popen.wait()

    def code(self) -> int:
        until(lambda: self._popen.poll() is not None, "the end of the command")
        return self._popen.returncode

    def said(self) -> str:
        return self.output.read_text(errors="replace")


def command_line(lab: Lab, outcome: Outcome) -> None:
    """Nothing forked: `python -m sprint`, then torchrun that starts its workers anew when one dies."""
    numbers, tempo = lab.random(outcome.name), lab.reference().tempo
    for processes in (1, 2):
        lab.reference(processes)
        command, first = lab.command(processes), numbers.randrange(1, 5)
        launcher = "python -m sprint" if processes == 1 else "torchrun"
        with Shell(command) as shell:
            shell.wait_for(first)
            time.sleep(numbers.random() * tempo.gaps[first])
            shell.kill()
        outcome.did(f"{launcher}: SIGKILL to all of it after line {command.rows()} of the log")
        restarts = 0 if processes == 1 else 2
        with Shell(command, restarts) as shell:
            for restart in range(restarts):
                row, rank = (7, 14)[restart] + numbers.randrange(5), numbers.randrange(processes)
                shell.wait_for(row)
                shell.kill(rank)
                outcome.did(f"{launcher} --max-restarts={restarts}: SIGKILL to rank {rank} after line {row}")
            code = shell.code()
            outcome.require(code == 0, f"{launcher} ended with {code}: {last_line(shell.said())}")
        outcome.compare(command.run, lab.reference(processes).run)


# ---- SIGTERM ----------------------------------------------------------------------------------------


def stop_requests(lab: Lab, outcome: Outcome) -> None:
    """SIGTERM finishes the step, saves and ends with 130; sent to one rank, it stops all."""
    numbers = lab.random(outcome.name)
    for processes in (1, 2):
        tempo, command = lab.reference(processes).tempo, lab.command(processes)
        stages = (("adapt", 1, lab.size.adapt), ("distill", lab.size.adapt + 1, lab.size.rows))
        for stage, first, last in stages:
            moment = Moment(numbers.randrange(first, last - 3), numbers.random(), rank=processes - 1)
            life = lab.live(command)
            if not reach(life, moment, tempo):
                outcome.require(False, f"the run ended before its SIGTERM: {last_line(life.said())}")
                return
            life.ranks[moment.rank].signal(signal.SIGTERM)
            codes = life.codes()
            step = command.rows() - (first - 1)
            who = "" if processes == 1 else f" to rank {moment.rank} of {processes}"
            outcome.did(f"SIGTERM{who} at {moment}: stopped after {stage} step {step}, codes {codes}")
            outcome.require(codes == [130] * processes, f"ended with {codes}, not 130")
            told = f"saved {stage} step {step} in"
            outcome.require(told in life.said(), f"did not say {told!r}: {last_line(life.said())}")
            names = [path.name for path in command.checkpoints()]
            outcome.require(any(name.endswith(f"-{stage}-{step}") for name in names), f"saved only {names}")
        lab.finish(outcome, command)


# ---- a rank that dies ---------------------------------------------------------------------------------


def dying_rank(lab: Lab, outcome: Outcome) -> None:
    """Two plain processes, no agent: the one that is left must name the other and end soon."""
    tempo, command, numbers = lab.reference(2).tempo, lab.command(2), lab.random(outcome.name)
    for victim, row in ((1, 4), (0, lab.size.adapt + 4)):
        life = lab.live(command)
        if not reach(life, Moment(row, numbers.random()), tempo):
            outcome.require(False, f"the run ended before its kill: {last_line(life.said())}")
            return
        seconds = seconds_alone(life, victim)
        code, said = life.codes()[1 - victim], last_line(life.said(1 - victim))
        outcome.did(f"rank {victim} killed: the other ended {seconds:.1f} s later with {code}: {said}")
        outcome.figures[f"seconds_after_rank_{victim}"] = seconds
        outcome.require(f"lost rank {victim} (" in said, f"the other does not name rank {victim}: {said}")
        outcome.require(code not in (0, 1), f"the other ended with {code}")
    lab.finish(outcome, command)


# ---- two runs in one folder ---------------------------------------------------------------------------


def second_run(lab: Lab, outcome: Outcome) -> None:
    """The same command while it is already running is refused, and disturbs nothing."""
    first = lab.live(lab.command())
    first.wait_for(2)
    second = lab.live(first.command)
    said = f"is in use by process {first.ranks[0].pid}"
    codes = second.codes()
    outcome.did(f"a second run ended with {codes[0]} while the first was at line {first.command.rows()}")
    outcome.require(not first.ended, "the first had ended before the second was refused")
    outcome.require(codes == [2] and said in second.said(), f"not refused: {last_line(second.said())}")
    outcome.require(not any(first.codes()), f"the first fails: {last_line(first.said())}")
    outcome.compare(first.command.run, lab.reference().run)
