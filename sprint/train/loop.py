"""One loop for both stages: batches in, updates, log, checkpoints, a clean way out."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

from sprint import checkpoint
from sprint.clock import Clock
from sprint.data.batch import Batch, Sample
from sprint.data.source import Source, batch_positions, prefetch
from sprint.engine import Engine
from sprint.log import RunLog
from sprint.train.update import Means


class Stage(Protocol):
    """What the loop needs of a stage; steps count from 0."""

    name: str
    steps: int
    batch_size: int
    clock: Clock  # `update` marks its parts on it

    def phase(self, step: int) -> str: ...
    def update(self, step: int, batch: Batch) -> Means: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class Interrupted(Exception):
    """The run was asked to stop and has saved; the same command goes on from there."""


def train(
    stage: Stage,
    source: Source,
    encode: Callable[[list[Sample]], Batch],
    engine: Engine,
    log: RunLog,
    folder: Path,
    save_every: int,
    log_every: int,
) -> float:
    """Run `stage` to its last step, from its newest checkpoint in `folder` if there is one.

    Every update's randomness and data depend on its step alone, so a resumed run is the uninterrupted one.
    Ctrl-C or SIGTERM ends the step, saves and raises `Interrupted`. The loop reads the device, and so waits
    for it, when it logs and when it saves.  -> seconds spent in this stage
    """
    done, seconds = resume(stage, folder)
    log.begin(stage.name, done)
    began = time.monotonic() - seconds

    def read(step: int) -> list[Sample]:
        rank = engine.accelerator.process_index
        return source.samples(batch_positions(step, stage.batch_size, rank, engine.processes))

    def save(step: int) -> None:
        if engine.main_process:
            state = {"step": step, "seconds": time.monotonic() - began, "stage": stage.state_dict()}
            checkpoint.save(folder, f"{stage.name}-{step}", state)
        engine.wait()

    with stop_requests() as stop, closing(prefetch(read, done, stage.steps)) as batches:
        for step in range(done, stage.steps):
            stage.clock.restart()
            with stage.clock.part("data"):
                samples = next(batches)
            with stage.clock.part("encode"):
                batch = encode(samples)
            means = stage.update(step, batch)
            phase, last = stage.phase(step), step + 1 == stage.steps
            log.advance(phase, stage.batch_size)
            if due(step, log_every) or last:
                milliseconds = stage.clock.read()
                log.write(step + 1, phase, means.read(engine), milliseconds)
            asked = engine.agree(bool(stop))
            if asked or last or (step + 1) % save_every == 0:
                save(step + 1)
            if asked:
                raise Interrupted(f"saved {stage.name} step {step + 1} in {folder}")
    return time.monotonic() - began


def due(step: int, log_every: int) -> bool:
    """True for two neighbouring steps in every 2 · log_every, so that both phases are seen."""
    return step % (2 * log_every) < 2


def resume(stage: Stage, folder: Path) -> tuple[int, float]:
    """Load the newest intact checkpoint.  -> steps done, seconds spent; zeros if there is none"""
    newest = checkpoint.latest(folder)
    if newest is None:
        return 0, 0.0
    state = checkpoint.load(newest)
    stage.load_state_dict(state["stage"])
    return state["step"], state["seconds"]


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that fills when SIGINT or SIGTERM arrives; a second signal acts as usual."""
    asked: list[int] = []

    def note(number, frame):
        asked.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
