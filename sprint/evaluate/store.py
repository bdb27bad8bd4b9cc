"""Pictures on disk, drawn once: a folder for each way of drawing, a PNG for each prompt and seed.

A picture depends on its prompt and its seed alone, so it does not matter which process drew it, in which batch,
or for which metric. What is there is whole; what is missing is drawn by the next run of the same command.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sprint.base.door import held_against, read_json
from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.base.progress import progress
from sprint.evaluate.result import KEY_DIGITS, Shot
from sprint.pages.png import is_whole, read_png, write_png
from sprint.sample.generate import Generator

log = logging.getLogger(__name__)
SAMPLING = 1  # of how a picture comes from prompt, seed and times; another number draws all pictures anew
PACKAGES = ("sprint-distill", "torch", "diffusers", "transformers")  # that a picture may depend on
DESCRIPTION = "drawing.json"  # in each folder: what it holds
POLL_SECONDS = 1.0  # between looks for the pictures of other processes
SILENT_SECONDS = 10.0  # of waiting, before it is said what is awaited
WRITERS = 4  # threads that compress PNGs while the next batch is drawn, or look whether they are whole


@dataclass(frozen=True)
class Drawing:
    """A way of drawing: equal ones give equal pictures, but for rounding.

    model      `model_hash`: SHA-256 of weights, configs and text settings
    times      TrigFlow times in radians, from at most π/2 to 0
    guidance   scale
    size       pixels a side
    dtype      of the weights, "fp32" or "bf16"
    sampling   `SAMPLING` of the program that drew
    """

    model: str
    times: tuple[float, ...]
    guidance: float
    size: int
    dtype: str = "fp32"
    sampling: int = SAMPLING

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def key(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


class Times(NamedTuple):
    """What drawing took, without writing."""

    batch: int  # pictures drawn together, at most
    pictures: int
    seconds: float


class PictureStore:
    """The pictures of one drawing, in ROOT/STEPS-KEY."""

    def __init__(self, root: Path, drawing: Drawing):
        self.drawing = drawing
        self.folder = Path(root) / f"{drawing.steps:02d}-{drawing.key}"

    def path(self, shot: Shot) -> Path:
        return self.folder / shot.file

    def missing(self, shots: Sequence[Shot]) -> list[Shot]:
        names = {file.name for file in self.folder.glob("*.png")}
        return [shot for shot in shots if shot.file not in names]

    def write(self, shot: Shot, picture: np.ndarray) -> Path:
        """picture: uint8 [H, W, 3]"""
        return write_png(self.path(shot), picture)

    def read(self, shot: Shot) -> np.ndarray:
        """-> uint8 [H, W, 3].  Raises SprintError where the file is damaged."""
        return read_png(self.path(shot))

    def remove_damaged(self, shots: Sequence[Shot]) -> list[Shot]:
        """Look at pictures that are there.  -> those that were damaged, and are missing now"""
        with ThreadPoolExecutor(WRITERS) as readers:
            whole = list(readers.map(is_whole, map(self.path, shots)))
        damaged = [shot for shot, fine in zip(shots, whole, strict=True) if not fine]
        for file in map(self.path, damaged):
            log.warning("%s: damaged picture; it is drawn again", file)
            file.unlink(missing_ok=True)
        return damaged

    def batches(self, shots: Sequence[Shot], size: int, what: str) -> Iterator[np.ndarray]:
        """uint8 [B, H, W, 3] in the order of `shots`, with a progress bar that says `what`."""
        with progress(what, len(shots)) as bar:
            for start in range(0, len(shots), size):
                part = shots[start : start + size]
                yield np.stack([self.read(shot) for shot in part])
                bar.update(len(part))

    def describe(self, name: str, took: Times | None = None) -> None:
        """Say beside the pictures what they are, which versions drew the last of them, and what they took.

        took   those that were drawn now; they add to what is known of the same size of batch
        """
        known = self.times()
        if took is None or not took.pictures:
            took = known
        elif known and known.batch == took.batch:
            took = Times(took.batch, known.pictures + took.pictures, known.seconds + took.seconds)
        about = {"name": name, **asdict(self.drawing), "versions": {p: version(p) for p in PACKAGES}}
        if took:
            about["times_of_drawing"] = took._asdict()
        write_whole(self.folder / DESCRIPTION, json.dumps(about, indent=1))

    def times(self) -> Times | None:
        """What `describe` kept; None where nothing is kept that can be read."""
        try:
            told = read_json(self.folder / DESCRIPTION).get("times_of_drawing")
            times = held_against(Times, told, self.folder / DESCRIPTION)
        except SprintError:
            return None
        return times if times.pictures > 0 and times.batch > 0 and 0 < times.seconds < math.inf else None


def draw(
    generator: Generator,
    store: PictureStore,
    shots: Sequence[Shot],
    batch_size: int,
    what: str,
    rank: int = 0,
    processes: int = 1,
) -> Times:
    """Draw what is missing or damaged of this process's share: every `processes`-th batch.  -> what that took

    Batches are cut from all shots before those that are there are left out, so that processes that look at
    different moments still divide the work in the same way.
    """
    batches = [shots[start : start + batch_size] for start in range(0, len(shots), batch_size)]
    mine = [shot for batch in batches[rank::processes] for shot in batch]
    missing = set(store.missing(mine))
    missing |= set(store.remove_damaged([shot for shot in mine if shot not in missing]))
    to_do = [part for batch in batches[rank::processes] if (part := [s for s in batch if s in missing])]
    drawing, seconds = store.drawing, 0.0
    on_cpu = generator.family.device.type == "cpu"
    bar = progress(what, len(mine), done=len(mine) - len(missing), show=rank == 0 and bool(missing))
    with bar, ThreadPoolExecutor(WRITERS) as writers:
        writing = []
        for part in to_do:
            prompts, seeds = [s.prompt for s in part], [s.seed for s in part]
            began = time.perf_counter()
            pictures = generator.pictures(
                prompts, seeds, None, drawing.guidance, drawing.size, list(drawing.times)
            )
            seconds += time.perf_counter() - began
            _finish(writing)
            writing = [writers.submit(store.write, *pair) for pair in zip(part, pictures, strict=True)]
            if on_cpu:  # where writers would take the cores that draw
                _finish(writing)
            bar.update(len(part))
        _finish(writing)
    return Times(batch_size, len(missing), seconds)


def in_batches(
    generator: Generator,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    times: Sequence[float],
    guidance: float,
) -> Iterator[np.ndarray]:
    """Draw and keep nothing.  -> uint8 [B, H, W, 3] of the prompts in their order"""
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        yield generator.pictures(
            list(prompts[part]), list(seeds[part]), guidance_scale=guidance, times=list(times)
        )


def _finish(writing: Sequence[Future]) -> None:
    """Errors of the writers are raised here."""
    for write in writing:
        write.result()


def wait_for(store: PictureStore, shots: Sequence[Shot]) -> None:
    """Until other processes have drawn their share. torchrun stops this one where another died."""
    began, told = time.monotonic(), False
    while missing := store.missing(shots):
        if not told and time.monotonic() - began >= SILENT_SECONDS:
            told = True
            log.warning("waiting for %d pictures of other processes in %s", len(missing), store.folder)
        time.sleep(POLL_SECONDS)
