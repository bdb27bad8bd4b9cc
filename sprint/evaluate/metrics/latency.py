"""Latency as a metric of `sprint evaluate`: how long a picture takes and where the time goes.

It looks at no pictures: models take turns, batch by batch. Whatever the device says, it costs latency alone.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from sprint.base.dtypes import DTYPES
from sprint.base.errors import NotHereError
from sprint.evaluate.metrics.registry import LATENCY
from sprint.evaluate.metrics.stopwatch import (
    FLUX,
    Contender,
    Latency,
    Spread,
    contender,
    flux_contender,
    measure_together,
)
from sprint.evaluate.models import TEACHER, Model
from sprint.evaluate.prompts import Prompts
from sprint.evaluate.result import Column, Figure, Measured
from sprint.sample.load import load_generator

log = logging.getLogger(__name__)
BATCHES, ROUNDS, WARMUP = (1, 10), 10, 3
SHOWN_PARTS = ("text", "network", "decoder")


class Timing:
    """The protocol of `latency`, and its figures."""

    metric = LATENCY

    def __init__(self, prompts: Prompts):
        self.texts = [shot.prompt for shot in prompts.shots[: max(BATCHES)]]
        self.words = f"the first {len(self.texts)} of {prompts.words}"
        self.device = ""

    def protocol(self) -> dict[str, str]:
        one, many = BATCHES
        return {
            "calls": f"batch {one} for latency, {many} for throughput; {ROUNDS} rounds after {WARMUP} of warm-up",
            "figures": "medians over the rounds; ± is half the distance between quartiles, no standard error",
            "prompts": self.words,
            "device": self.device,
        }

    def measure(self, contenders: Sequence[Contender], teacher: int | None) -> list[Measured]:
        """Figures for each contender; `teacher`: the place of the one that the others are held against."""
        found = measure_together(contenders, self.texts, BATCHES, ROUNDS, WARMUP)
        single, together = found[: len(contenders)], found[len(contenders) :]
        self.device = single[0].device
        return [
            Measured(_figures(one, many, None if teacher in (None, place) else single[teacher]))
            for place, (one, many) in enumerate(zip(single, together, strict=True))
        ]


def _figures(one: Latency, many: Latency, teacher: Latency | None) -> dict[str, Figure]:
    figures = {"latency, ms": middle(one.spread("whole"), 1000)}
    figures |= {f"{part}, ms": middle(one.spread(part), 1000) for part in SHOWN_PARTS}
    figures["pictures a second"] = Figure(many.pictures_per_second, spec=".1f")
    if teacher is not None:
        figures["faster than the teacher"] = middle(one.times_faster_than(teacher), higher=True)
    return figures


def middle(spread: Spread, scale: float = 1, higher: bool = False) -> Figure:
    """The median, with half the distance between the quartiles, or with both in words where they lie far apart."""
    median, first, third = (scale * x for x in (spread.median, spread.quartile_1, spread.quartile_3))
    if third - first > median:
        return Figure(median, None, higher, ".1f", f"quartiles {first:.1f} to {third:.1f}")
    return Figure(median, (third - first) / 2, higher, ".1f")


def time_columns(
    clock: Timing,
    columns: Sequence[Column],
    models: Sequence[Model],
    device: torch.device | str,
    dtype: torch.dtype,
    guidance: float,
) -> list[Column]:
    """-> the columns with their times, and one of FLUX-schnell where that is here and fits

    columns   by model, then by steps, as `models` have them

    Raises SprintError or RuntimeError where nothing can be timed.
    """
    contenders = []
    for model in models:
        generator = load_generator(model.path, device, dtype, model.family)
        contenders += [contender(generator, steps, guidance) for steps in model.steps]
    held_against = next(
        (i for i, c in enumerate(columns) if c.role == TEACHER and c.model == models[-1].path), None
    )
    with_flux = torch.device(device).type == "cuda" and not any(model.small for model in models)
    if with_flux and (found := _beside_flux(clock, contenders, held_against, device)):
        flux, measured = found
        return _filled(clock, [*columns, flux], measured)
    return _filled(clock, columns, clock.measure(contenders, held_against))


def _beside_flux(
    clock: Timing, contenders: Sequence[Contender], held_against: int | None, device: torch.device | str
) -> tuple[Column, list[Measured]] | None:
    """FLUX-schnell's column, and figures of all with it; None where it is not here or does not fit."""
    try:
        flux = flux_contender(device=device)
        dtype = next(name for name, dtype in DTYPES.items() if dtype == flux.dtype)
        column = Column(flux.name, flux.steps, FLUX, size=flux.size, dtype=dtype)
        return column, clock.measure([*contenders, flux], held_against)
    except NotHereError as error:
        log.warning("%s", error)
    except RuntimeError as error:
        log.warning("FLUX-schnell left out: %s", first_line(error))
    return None


def _filled(clock: Timing, columns: Sequence[Column], measured: Sequence[Measured]) -> list[Column]:
    pairs = zip(columns, measured, strict=True)
    return [replace(column, measured=column.measured | {clock.metric.name: found}) for column, found in pairs]


def first_line(error: Exception) -> str:
    """What a device says when it runs out of memory goes on for lines."""
    return str(error).strip().split("\n")[0] or type(error).__name__
