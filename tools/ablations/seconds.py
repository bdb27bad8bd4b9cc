"""What training costs, in seconds of one thread."""

from collections.abc import Iterator, Sequence
from statistics import median

SLOW = 3.0  # times the median of its kind: an update that compiled, or that a busy machine held up


def thread_seconds(rows: Sequence[dict], stage: str, last: int | None = None) -> tuple[float, float]:
    """Seconds of one thread that `stage` trained for, and what is left out of them.

    rows   of a metrics.jsonl that has every update of a run on one thread
    last   count to this step of the stage; None: all

    An update of more than `SLOW` times the median of its kind counts as that median: the first of each kind compiles,
    and so does the first after a break. Loading, scoring and breaks are in neither number.
    """
    taken = list(_updates(rows, stage))
    usual = {phase: median(s for p, _, s in taken if p == phase) for phase in {p for p, _, _ in taken}}
    counted = left_out = 0.0
    for phase, step, seconds in taken:
        if last is not None and step > last:
            break
        kept = seconds if seconds <= SLOW * usual[phase] else usual[phase]
        counted, left_out = counted + kept, left_out + seconds - kept
    return counted, left_out


def _updates(rows: Sequence[dict], stage: str) -> Iterator[tuple[str, int, float]]:
    """(phase, step, seconds) of every update."""
    before = 0.0
    for row in rows:
        if row["stage"] == stage:
            yield row["phase"], row["step"], row["seconds"] - before
        before = row["seconds"]
