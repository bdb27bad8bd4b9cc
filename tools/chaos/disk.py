"""What disks do to runs: they fill up, they tear and flip what was written.

Imported by chaos.py; not a program.
"""

import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from sprint.base.files import sha256
from tools.chaos.lab import Lab, Outcome, last_line
from tools.chaos.runs import Command, environment, until

# bytes: less than a file of a checkpoint's tensors, more than anything else that training writes
SMALL = 2**20


# ---- full -------------------------------------------------------------------------------------------


def full_disk(lab: Lab, outcome: Outcome) -> None:
    """No space for the next checkpoint: one line, exit 2, the others intact; then the same command with space."""
    command = at_checkpoints(lab, "adapt", 1)
    checkpoint = sum(file.stat().st_size for file in command.checkpoints()[0].iterdir())
    file_limit(lab, outcome, command)
    small_disk(lab, outcome, checkpoint)


def file_limit(lab: Lab, outcome: Outcome, command: Command) -> None:
    """A limit on the size of files (RLIMIT_FSIZE), as a quota would set it.

    command   of a killed run with a checkpoint
    """
    before = digests(command)
    life = lab.live(command, largest_file=SMALL)
    codes, said = life.codes(), last_line(life.said())
    outcome.did(f"no file above {SMALL >> 20} MiB: ended with {codes[0]}: {said}")
    outcome.require(codes == [2] and said.startswith("sprint: cannot write checkpoint"), "not one clear line")
    outcome.require(before.items() <= digests(command).items(), "an earlier checkpoint has changed")
    life = lab.finish(outcome, command)
    outcome.require(
        resumed_at(life.said(), "adapt", lab.size.save_every), "did not go on from the earlier checkpoint"
    )


def small_disk(lab: Lab, outcome: Outcome, checkpoint: int) -> None:
    """A file system of its own that is too small, and then is not (tmpfs, where the system lets us mount it).

    checkpoint   bytes of one
    """
    command = lab.command()
    (command.folder / "runs").mkdir(parents=True)
    size = checkpoint * 5 // 2 // 1024  # KiB: two checkpoints, and not the third before one of them goes
    script = f"""
        mount -t tmpfs -o size={size}k none runs || exit 99
        "$@" 2> first; echo $? > first.code
        cp -r runs/*/checkpoints between
        mount -o remount,size=1g none runs
        "$@" 2> second; echo $? > second.code
        cp -r runs/* after
    """
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", *command.in_shell()],
        cwd=command.folder,
        env=environment(),
        capture_output=True,
    )
    if not (command.folder / "first.code").exists():
        outcome.did(f"no disk of our own here: {last_line(done.stderr.decode(errors='replace'))}")
        return
    said, code = (command.folder / "first").read_text(), (command.folder / "first.code").read_text().strip()
    outcome.did(f"a disk of {size >> 10} MiB: ended with {code}: {last_line(said)}")
    clear = "No space left on device" in last_line(said)
    outcome.require(code == "2" and clear, f"not one clear line: {last_line(said)}")
    kept = sorted(path.name for path in command.folder.glob("between/*/[0-9]*"))
    outcome.require(bool(kept), "no checkpoint is left")
    step = int(kept[-1].rpartition("-")[2]) if kept else 0
    said, code = (command.folder / "second").read_text(), (command.folder / "second.code").read_text().strip()
    outcome.did(f"with space: went on from step {step}, ended with {code}")
    outcome.require(code == "0", f"the same command fails: {last_line(said)}")
    outcome.require(resumed_at(said, "adapt", step), f"did not go on from {kept[-1:]}")
    outcome.compare(command.folder / "after", lab.reference().run)


# ---- damaged ----------------------------------------------------------------------------------------


def truncated(checkpoint: Path, numbers: random.Random) -> None:
    cut(tensors_of(checkpoint), numbers)


def bit_in_tensors(checkpoint: Path, numbers: random.Random) -> None:
    flip(tensors_of(checkpoint), numbers)


def bit_in_facts(checkpoint: Path, numbers: random.Random) -> None:
    flip(checkpoint / "facts.json", numbers)


def bit_in_manifest(checkpoint: Path, numbers: random.Random) -> None:
    flip(checkpoint / "manifest.json", numbers)


def bit_in_index(checkpoint: Path, numbers: random.Random) -> None:
    flip(checkpoint / ".metadata", numbers)


def file_missing(checkpoint: Path, numbers: random.Random) -> None:
    tensors_of(checkpoint).unlink()


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    truncated,
    bit_in_tensors,
    bit_in_facts,
    bit_in_manifest,
    bit_in_index,
    file_missing,
]


def tensors_of(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.distcp"))


def cut(file: Path, numbers: random.Random) -> None:
    with open(file, "r+b") as stream:
        stream.truncate(numbers.randrange(file.stat().st_size))


def flip(file: Path, numbers: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)
    file.write_bytes(content)


def damaged_checkpoints(lab: Lab, outcome: Outcome) -> None:
    """The newest checkpoint in every way we know, then all of them; each time on a copy of one killed run."""
    numbers, killed = lab.random(outcome.name), at_checkpoints(lab, "distill", 2)
    lab.reference()
    cases = [(damage.__name__.replace("_", " "), [damage], lab.size.save_every) for damage in DAMAGES]
    cases.append(("a bit in each of all", [bit_in_tensors] * len(killed.checkpoints()), 0))
    for pair in (cases[i : i + 2] for i in range(0, len(cases), 2)):  # two at a time: each has one thread
        copies = [copy_of(lab, killed) for _ in pair]
        for copy, (_, each, _) in zip(copies, pair, strict=True):
            for damage, checkpoint in zip(each, copy.checkpoints(), strict=False):
                damage(checkpoint, numbers)
        lives = [lab.live(copy) for copy in copies]
        for life, (name, each, step) in zip(lives, pair, strict=True):
            lab.finished(outcome, life)
            judge_recovery(outcome, life.said(), name, step, len(each))


def judge_recovery(outcome: Outcome, said: str, damage: str, step: int, damaged: int) -> None:
    """The same command must have said what is damaged, and begun at `step`."""
    told = [line for line in said.splitlines() if "is damaged" in line]
    outcome.did(f"{damage}: went on from step {step}; said: {told[-1] if told else 'nothing'}")
    outcome.require(len(told) == damaged, f"named {len(told)} damaged checkpoints, not {damaged}")
    outcome.require(resumed_at(said, "distill", step), f"did not go on from step {step}")


# ---- shared -----------------------------------------------------------------------------------------


def at_checkpoints(lab: Lab, stage: str, count: int) -> Command:
    """A run that was killed when it had so many checkpoints of the stage and was a step further."""
    life = lab.live(lab.command())
    first = lab.size.adapt if stage == "distill" else 0
    life.wait_for(first + count * lab.size.save_every + 1)
    until(
        lambda: (len(life.command.checkpoints()) >= count and not life.writing()) or life.ended, "checkpoints"
    )
    life.kill()
    life.codes()
    return life.command


def copy_of(lab: Lab, command: Command) -> Command:
    copy = lab.command()
    shutil.copytree(command.folder, copy.folder)
    return copy


def digests(command: Command) -> dict[Path, str]:
    return {file: sha256(file) for folder in command.checkpoints() for file in folder.iterdir()}


def resumed_at(said: str, stage: str, step: int) -> bool:
    """The first progress line of the stage says so."""
    lines = [line for line in said.replace("\r", "\n").splitlines() if f"/2 {stage} " in line]
    return bool(lines) and f"| {step}/" in lines[0]
