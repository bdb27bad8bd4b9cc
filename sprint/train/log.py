"""What a run says while it runs: metrics.jsonl first, a progress bar, Weights & Biases if asked for.

One line of metrics.jsonl is one logged update:

    {"stage": "distill", "step": 40, "phase": "G", "seconds": 81.2, "loss": -6.31, ..., "ms_teacher": 97.1, ...}

stage    "adapt" or "distill"
step     updates of this stage, this one included; the first is 1
phase    "flow" (stage 1), "G" (student), "D" (discriminator heads) or "F" (fake score)
seconds  of training since the run began; a resumed run counts on from its last kept line
ms_…     milliseconds that a part of this update took, "ms_teacher" say (`sprint.base.clock`); "ms_other" is what
         lies between the parts
The rest are the numbers of the step; null where one was not finite.
"""

import json
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from tqdm import tqdm

from sprint.base.door import held_against, parse_json, read_bytes
from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.base.progress import BAR, QUIET_INTERVAL
from sprint.train.track import Tracked

log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
METRICS_BYTES = 2**32
RATE_WINDOW = 50  # steps over which samples per second are taken
TIME = "ms_"  # before the name of a part of the update


PLACE = ("stage", "step", "phase", "seconds")
Number = Annotated[float, Field(allow_inf_nan=False)]


@dataclass
class Place:
    """What every line says besides its numbers."""

    stage: str
    step: Annotated[int, Field(ge=1, lt=2**53)]
    phase: str
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


def read_metrics(path: Path) -> list[dict]:
    """Every whole line of a metrics.jsonl; none if there is no file.

    A last line without its newline is what a killed process leaves, and is passed over. Lines that are damaged are
    too, with a warning. Raises SprintError for what is no file.
    """
    if not path.exists():
        return []
    lines = read_bytes(path, METRICS_BYTES).split(b"\n")[:-1]
    rows, damaged = [], []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_row(line, path))
        except SprintError:
            damaged.append(number)
    if damaged:
        log.warning("%s: %d damaged lines are passed over, the first is %d", path, len(damaged), damaged[0])
    return rows


def _row(line: bytes, path: Path) -> dict:
    row = held_against(dict[str, Any], parse_json(line, path), path)
    place = {name: row.pop(name) for name in PLACE if name in row}
    return asdict(held_against(Place, place, path)) | held_against(dict[str, Number | None], row, path)


def truncate_metrics(path: Path, stage: str, step: int) -> list[dict]:
    """Cut the file at the first line of `stage` past `step`, so that a resumed curve has no doubles.

    What follows that line is cut too: a later stage was trained from weights that are no longer there.
    Returns the lines that stay.
    """
    rows = read_metrics(path)
    stale = (i for i, row in enumerate(rows) if row["stage"] == stage and row["step"] > step)
    kept = rows[: next(stale, len(rows))]
    if path.exists():
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


class RunLog:
    """The log of one run, a context manager.

    folder        the run's folder; metrics.jsonl is appended there
    totals        steps of every stage in order, {"adapt": 80, "distill": 400}
    main_process  the others call the same methods and say nothing
    wandb         also log to Weights & Biases, offline unless WANDB_MODE says otherwise;
                  raises SprintError where that cannot begin

        with RunLog(folder, {"adapt": 80, "distill": 400}) as log:
            log.begin("adapt", step=0)
            for step in range(1, 81):
                ...
                log.advance("flow", samples=64)
                if step % 5 == 0:
                    log.write(step, "flow", {"loss": loss, "grad_norm": norm})
    """

    def __init__(
        self, folder: Path, totals: Mapping[str, int], *, main_process: bool = True, wandb: bool = False
    ):
        self.path = Path(folder) / METRICS
        self.totals = dict(totals)
        self.main_process = main_process
        self.stage = ""
        self._began: float | None = None
        self._file = None
        self._bar: tqdm | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW)  # (time, samples) of each step
        self._tracked = Tracked(Path(folder), totals) if wandb and main_process else None

    def begin(self, stage: str, step: int) -> None:
        """Enter `stage` with `step` steps done (0, or where it resumes); lines logged past it are dropped."""
        self.stage = stage
        self._recent.clear()
        if not self.main_process:
            return
        self._close_stage()
        kept = truncate_metrics(self.path, stage, step)
        if self._began is None:
            self._began = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        self._bar = self._progress_bar(step)

    def advance(self, phase: str, samples: int) -> None:
        """One step of `phase` is done, on `samples` pictures over all processes. Moves the bar."""
        if not self.main_process:
            return
        self._recent.append((time.monotonic(), samples))
        self._bar.set_description_str(f"{self._stage_title()} {phase:<4}", refresh=False)
        self._bar.update(1)

    def write(
        self,
        step: int,
        phase: str,
        metrics: Mapping[str, float],
        milliseconds: Mapping[str, float] | None = None,
    ) -> None:
        """Append one line. The bar shows the metrics whose names begin with "loss".

        milliseconds    of the update's parts by name
        """
        if not self.main_process:
            return
        numbers = {name: _finite(value) for name, value in metrics.items()}
        numbers |= {TIME + part: round(value, 3) for part, value in (milliseconds or {}).items()}
        row = {"stage": self.stage, "step": step, "phase": phase, "seconds": round(self.seconds, 3)}
        if taken := row.keys() & numbers.keys():
            raise ValueError(f"a metric may not be called {', '.join(sorted(taken))}")
        self._file.write(json.dumps(row | numbers) + "\n")
        self._file.flush()
        self._bar.set_postfix_str(_postfix(phase, numbers, self.samples_per_second), refresh=False)
        if self._tracked:
            curves = {f"{self.stage}/{phase}/{name}": value for name, value in numbers.items()}
            self._tracked.log({f"{self.stage}/step": step} | curves)

    @property
    def seconds(self) -> float:
        """Since the run began, the time before a resume included."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    @property
    def samples_per_second(self) -> float | None:
        """Over the last steps of this stage; None until there are two."""
        if len(self._recent) < 2:
            return None
        (start, _), *rest = self._recent
        return sum(samples for _, samples in rest) / max(rest[-1][0] - start, 1e-9)

    def close(self) -> None:
        self._close_stage()
        if self._tracked:
            self._tracked.finish()
            self._tracked = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _close_stage(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _stage_title(self) -> str:
        return f"{list(self.totals).index(self.stage) + 1}/{len(self.totals)} {self.stage}"

    def _progress_bar(self, step: int) -> tqdm:
        return tqdm(
            total=self.totals[self.stage],
            initial=step,
            desc=self._stage_title(),
            bar_format=BAR,
            file=sys.stderr,
            mininterval=0.2 if sys.stderr.isatty() else QUIET_INTERVAL,
            dynamic_ncols=True,
        )


def _finite(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _postfix(phase: str, numbers: Mapping[str, float | None], rate: float | None) -> str:
    losses = [
        f"{name} {'not finite' if value is None else f'{value:.3g}'}"
        for name, value in numbers.items()
        if name.startswith("loss")
    ]
    speed = [] if rate is None else [f"{rate:.3g} samples/s"]
    return " · ".join([f"{phase} {', '.join(losses)}" if losses else phase, *speed])
