"""One loop for both stages: batches in, updates, log, checkpoints, a clean way out."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from sprint.base.errors import SprintError
from sprint.data.batch import Batch, Item
from sprint.data.batching import batch_positions, prefetch
from sprint.data.source import Source
from sprint.engine import checkpoint
from sprint.engine.engine import Engine
from sprint.train.log import RunLog
from sprint.train.stage import Stage

T = TypeVar("T")
GO_ON, STOP, TROUBLE = 0, 1, 2  # what a process has to say after a step; the highest counts


class Rhythm(NamedTuple):
    """Steps between checkpoints, steps between lines of the log, and threads that read ahead."""

    save_every: int
    log_every: int
    workers: int = 1


class Checkpoints(NamedTuple):
    """A stage's folder of checkpoints, and the newest intact one, from which it goes on."""

    folder: Path
    newest: Path | None

    @classmethod
    def find(cls, folder: Path, engine: Engine) -> "Checkpoints":
        """Every file of the newest is read to find it intact. Collective."""
        newest = engine.broadcast_from_main(lambda: str(checkpoint.latest(folder) or ""))
        return cls(folder, Path(newest) if newest else None)


class Interrupted(Exception):
    """The run was asked to stop and has saved; the same command goes on from there."""


def train(
    stage: Stage,
    source: Source,
    encode: Callable[[list[Item]], Batch],
    engine: Engine,
    log: RunLog,
    checkpoints: Checkpoints,
    rhythm: Rhythm,
) -> float:
    """Run `stage` to its last step, from its newest checkpoint if there is one.

    Every update's randomness and data depend on its step alone, so a resumed run is the uninterrupted one.
    Ctrl-C or SIGTERM, on any process, ends the step, saves and raises `Interrupted` on all. The loop reads the
    device, and so waits for it, when it logs and when it saves. Raises Diverged, which names the last good checkpoint,
    where weights are not finite, and at the end where no update was ever taken.  -> seconds spent in this stage
    """
    folder = checkpoints.folder
    done, seconds = resume(stage, checkpoints.newest, engine)
    log.begin(stage.name, done)
    began = time.monotonic() - seconds
    saver = checkpoint.Saver(folder, group=engine.new_gloo_group())

    def read(step: int) -> list[Item]:
        return source.samples(batch_positions(step, stage.reads, engine.rank, engine.processes))

    def save(step: int, wait: bool) -> None:
        _good(stage.check, engine, saver)
        stage.drop_gradients()  # on a CPU what is written is copied into their place
        facts = {"step": step, "seconds": time.monotonic() - began, "stage": stage.facts()}
        saver.save(f"{stage.name}-{step}", stage.tensors(), facts, wait)

    with stop_requests() as stop, closing(prefetch(read, done, stage.steps, rhythm.workers)) as batches:
        for step in range(done, stage.steps):
            stage.clock.restart()
            with stage.clock.part("data"):
                samples = next(batches)
            with stage.clock.part("encode"):
                batch = encode(samples)
            means = stage.update(step, batch)
            phase, last = stage.phase(step), step + 1 == stage.steps
            log.advance(phase, stage.batch_size)
            if due(step, rhythm.log_every, stage.kinds) or last:
                milliseconds = stage.clock.read()
                log.write(step + 1, phase, _good(partial(means.read, engine), engine, saver), milliseconds)
            word = engine.max_over_ranks(TROUBLE if saver.troubled else STOP if stop else GO_ON)
            if word == TROUBLE:
                saver.wait()  # raises what the trouble is
            if last:
                _good(stage.check_moved, engine, saver)
            if word == STOP or last or (step + 1) % rhythm.save_every == 0:
                save(step + 1, wait=word == STOP or last)
            if word == STOP:
                raise Interrupted(f"saved {stage.name} step {step + 1} in {folder}")
        saver.wait()
        # it came while the last checkpoint was written
        if engine.max_over_ranks(STOP if stop else GO_ON) == STOP:
            raise Interrupted(f"saved {stage.name} step {stage.steps} in {folder}")
    return time.monotonic() - began


def _good(look: Callable[[], T], engine: Engine, saver: checkpoint.Saver) -> T:
    """What `look` gives; the SprintError that it raises names the checkpoint from which the run can go on."""
    try:
        return look()
    except SprintError as error:
        saver.wait()
        newest = engine.broadcast_from_main(lambda: str(checkpoint.latest(saver.folder) or "none"))
        raise type(error)(f"{error}; nothing is exported; the last good checkpoint: {newest}") from error


def due(step: int, log_every: int, kinds: int) -> bool:
    """True for the first, and every `log_every`-th one after it, of each of `kinds` of updates that take turns."""
    return step // kinds % log_every == 0


def resume(stage: Stage, newest: Path | None, engine: Engine) -> tuple[int, float]:
    """Load the newest checkpoint.  -> steps done, seconds spent; zeros if there is none"""
    if not newest:
        return 0, 0.0
    facts = checkpoint.read_facts(newest)
    stage.load(partial(checkpoint.read_tensors, newest, group=engine.hosts), facts["stage"])
    return facts["step"], facts["seconds"]


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that fills when SIGINT or SIGTERM arrives. A second SIGINT acts as usual; of SIGTERM a launcher and
    a scheduler may send one each, so more of them say nothing new.
    """
    asked: list[int] = []

    def note(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
