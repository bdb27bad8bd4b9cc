"""Bad samples: counted by reason, listed once each, and too many of them stop the run."""

import json
import math
import threading
from collections import Counter
from pathlib import Path

from sprint.base.errors import SprintError
from sprint.base.locks import LOCKS, lock
from sprint.data.items import BadSample, said

ENOUGH = 100  # samples tried before their share says anything
CHANCE = 3.0  # standard deviations by which a share of some of the samples may stray from that of all


class BadSamples:
    """What this process has met since it started; a sample counts once, however often it comes up.

    share   of samples tried, how many may be bad before the run stops (data.bad_share)
    total   samples there are
    file    JSON lines {"where", "reason", "detail"}, shared with other processes and later runs; None: no list
    """

    def __init__(self, share: float, total: int, file: Path | None = None):
        self._share, self._total = share, total
        self._list = BadList(file) if file else None
        self._tried = 0
        self._last = ""
        self._reasons: dict[str, str] = {}  # by where
        self._lock = threading.Lock()

    @property
    def by_reason(self) -> dict[str, int]:
        """Most frequent first."""
        with self._lock:
            return dict(Counter(self._reasons.values()).most_common())

    def summary(self) -> str:
        """ "3 unreadable picture, 1 empty caption; listed in FILE" """
        counts = ", ".join(f"{count} {reason}" for reason, count in self.by_reason.items())
        return counts + (f"; listed in {self._list.file}" if self._list else "")

    def good(self) -> None:
        """Count one that could be read. Raises `SprintError` as `bad` does."""
        with self._lock:
            self._tried += 1
        self._judge()

    def bad(self, sample: BadSample) -> None:
        """Count it, and list it if it is new.

        Raises `SprintError` when more than `share` are bad, of all there are; or, while only some have been
        tried (at least `ENOUGH`), more than chance explains if `share` of all are.
        """
        with self._lock:
            self._tried += 1
            self._last = str(sample)
            if sample.where not in self._reasons:
                self._reasons[sample.where] = sample.reason
                if self._list:
                    self._list.add(sample)
        self._judge()

    def _judge(self) -> None:
        tried, bad = min(self._tried, self._total), len(self._reasons)
        allowed = self._share * tried
        if tried < self._total:
            allowed += CHANCE * math.sqrt(allowed)
        if tried >= min(ENOUGH, self._total) and bad > allowed:
            raise SprintError(
                f"{self._last}; {bad} of {tried} samples tried are bad, more than data.bad_share = {self._share} "
                f"allows ({self.summary()})"
            )


class BadList:
    """The file, to which several processes add and in which each sample stands once."""

    def __init__(self, file: Path):
        self.file = file
        self._known: set[str] = set()
        self._read = 0  # bytes of the file that `_known` holds

    def add(self, sample: BadSample) -> None:
        """Raises `SprintError` if the file cannot be written."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a+b") as stream:
                if LOCKS:  # else several processes may list the same sample
                    lock(stream)
                self._add(stream, sample)
        except OSError as error:
            raise SprintError(f"{self.file}: cannot be written: {said(error)}") from error

    def _add(self, stream, sample: BadSample) -> None:
        stream.seek(self._read)
        others = stream.read()
        self._known.update(_wheres(others))
        if sample.where not in self._known:
            entry = {"where": sample.where, "reason": sample.reason, "detail": sample.detail}
            torn = others and not others.endswith(b"\n")  # by a crash
            stream.write(b"\n" * bool(torn) + json.dumps(entry).encode() + b"\n")
            self._known.add(sample.where)
            self._read = stream.tell()


def _wheres(lines: bytes) -> list[str]:
    found = []
    for line in lines.splitlines():
        try:
            found.append(json.loads(line)["where"])
        except (ValueError, TypeError, KeyError):  # a torn line
            continue
    return found
