"""Where the time of an update goes, by part."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

OTHER = "other"


class Clock:
    """Milliseconds of one update by part.

        clock.restart()
        with clock.part("teacher"):
            ...
        with clock.part("backward"):
            ...
        clock.read()  # {"teacher": 12.1, "backward": 40.7, "other": 0.3}

    A part that comes several times, once for each micro-batch, say, is added up. On CUDA a part lasts from
    when the device comes to it to when the device is done with it: events in its queue mark both, and only
    `read` waits for them. On any other device it is the host's time.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._mark: Callable[[], object] = _cuda_event if self._cuda else time.perf_counter
        self._running: str | None = None
        self.restart()

    def restart(self) -> None:
        """Forget what was measured: an update begins."""
        self._parts: list[tuple[str, object, object]] = []
        self._began = self._mark()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Raises RuntimeError inside another part: their times would count twice."""
        if self._running is not None:
            raise RuntimeError(
                f"part {name!r} inside part {self._running!r}: the parts of a clock do not nest"
            )
        self._running, began = name, self._mark()
        try:
            yield
        finally:
            self._parts.append((name, began, self._mark()))
            self._running = None

    def read(self) -> dict[str, float]:
        """Milliseconds since `restart` or the last reading: by part, in order of their beginning, then "other"."""
        ended = self._mark()
        if self._cuda:
            ended.synchronize()
        times: dict[str, float] = {}
        for name, began, done in self._parts:
            times[name] = times.get(name, 0.0) + self._milliseconds(began, done)
        times[OTHER] = max(0.0, self._milliseconds(self._began, ended) - sum(times.values()))
        self.restart()
        return times

    def _milliseconds(self, began, ended) -> float:
        return began.elapsed_time(ended) if self._cuda else 1000 * (ended - began)


def _cuda_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
