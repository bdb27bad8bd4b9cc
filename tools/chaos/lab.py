"""What the cases of chaos.py work with: scratch runs, and the judgement of whether anything was lost.

Imported by chaos.py and its cases; not a program.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sprint.base.errors import SprintError
from sprint.base.files import sha256
from sprint.train.log import METRICS, read_metrics
from tools.chaos.runs import (
    Command,
    Life,
    Size,
    Tempo,
    Zygote,
)

TIMES = ("seconds", "ms_")  # what begins so in metrics.jsonl is of the clock and differs between any two runs


def losses_of(run: Path, reference: Path) -> list[str]:
    """What a finished run lacks of the undisturbed one; nothing: it has the same bits.

    Compared are all safetensors of teacher and student, byte for byte, and metrics.jsonl but for its times.
    """
    lost = []
    weights = sorted(file.relative_to(reference) for file in reference.glob("*/**/*.safetensors"))
    if not {"teacher", "student"} <= {file.parts[0] for file in weights}:
        raise SprintError(f"{reference}: no finished run to compare with")
    for file in weights:
        if not (run / file).is_file():
            lost.append(f"{file} is missing")
        elif sha256(run / file) != sha256(reference / file):
            lost.append(f"{file} has other bits")
    ours, theirs = (_log(folder / METRICS) for folder in (run, reference))
    places = [(row["stage"], row["step"]) for row in ours]
    wanted = [(row["stage"], row["step"]) for row in theirs]
    if places != wanted:
        lost.append(f"the log has {len(places)} lines, not each of {len(wanted)} steps once and in order")
    for row, other in zip(ours, theirs, strict=False) if places == wanted else ():
        for key in sorted(row.keys() | other.keys()):
            if row.get(key) != other.get(key):
                lost.append(
                    f"{row['stage']} step {row['step']}: {key} = {row.get(key)}, not {other.get(key)}"
                )
    return lost


def _log(file: Path) -> list[dict]:
    return [{key: row[key] for key in row if not key.startswith(TIMES)} for row in read_metrics(file)]


@dataclass
class Outcome:
    """What a case tried, and what it found lost. Both are printed as they come."""

    name: str
    tried: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    figures: dict = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def did(self, text: str) -> None:
        self.tried.append(text)
        print(f"  {text}", flush=True)

    def require(self, truth: bool, otherwise: str) -> None:
        if not truth:
            self.lost.append(otherwise)
            print(f"  LOST: {otherwise}", flush=True)

    def compare(self, run: Path, reference: Path) -> None:
        for text in losses_of(run, reference):
            self.require(False, text)


class Reference(NamedTuple):
    """An undisturbed run."""

    run: Path
    tempo: Tempo


class Lab:
    """Scratch space, the zygote, random numbers from one seed, and the runs to compare with.

    kills   how many are tried, of one process and of two
    """

    def __init__(self, folder: Path, zygote: Zygote, seed: int, kills: int, size: Size):
        self.folder, self.zygote, self.seed, self.kills, self.size = folder, zygote, seed, kills, size
        self._references: dict[int, Reference] = {}
        self._lives: list[Life] = []
        self._commands = 0

    def random(self, name: str) -> random.Random:
        return random.Random(f"{self.seed}/{name}")

    def command(self, processes: int = 1, extra: tuple[str, ...] = ()) -> Command:
        """In a new folder."""
        self._commands += 1
        return Command(self.folder / f"{self._commands:03d}", self.size, processes, extra)

    def live(self, command: Command, largest_file: int = 0) -> Life:
        self._lives.append(Life(self.zygote, command, largest_file))
        return self._lives[-1]

    def reference(self, processes: int = 1) -> Reference:
        """Made when it is first asked for. Raises Stuck, SprintError if it fails."""
        if processes not in self._references:
            life = self.live(self.command(processes))
            tempo = Tempo.of(life)
            if any(life.codes()):
                raise SprintError(f"an undisturbed run fails: {last_line(life.said())}")
            self._references[processes] = Reference(life.command.run, tempo)
        return self._references[processes]

    def finish(self, outcome: Outcome, command: Command) -> Life:
        """The same command once more, undisturbed, to the end; that must be the reference's."""
        return self.finished(outcome, self.live(command))

    def finished(self, outcome: Outcome, life: Life) -> Life:
        """Wait for the end of a life, which must be the reference's."""
        command = life.command
        outcome.require(not any(life.codes()), f"the same command fails: {last_line(life.said())}")
        outcome.compare(command.run, self.reference(command.processes).run)
        return life

    def clear(self) -> None:
        """Ends what a failed case has left running."""
        for life in self._lives:
            if not life.ended:
                life.kill()
                life.codes()
        self._lives.clear()


def last_line(text: str) -> str:
    """The last one of sprint itself, which torchrun's own report may follow; else of anybody."""
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip(" =-")]
    own = [line for line in lines if line.startswith("sprint: ")]
    return (own or lines or ["it said nothing"])[-1]
