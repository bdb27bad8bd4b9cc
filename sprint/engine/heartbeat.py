"""Signs of life between the processes of a run, so that one that dies is named and nobody waits for it for ever.

Every process counts up in a store that rank 0 hosts. Rank 0 alone reads all counters and publishes who is late;
the others read that bulletin, whose own counter is rank 0's sign of life. Silence is timed by the clock of whoever
listens, so clocks of different hosts are never compared. A thread gives the signs: they say that a process exists,
not that its training moves.
"""

import atexit
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch.distributed import DistError, ProcessGroup, TCPStore

from sprint.base.errors import SprintError

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, try it again
LATE = 3  # intervals without a sign that count as silence: two of them pass between two loops out of phase
CERTAIN = 7  # intervals after a death in which everyone learns of it: until late, published, read
CONNECT = timedelta(seconds=60)
LEFT, FAILED = "left", "failed: "  # what stands in place of a counter at the end
BULLETIN = "bulletin"
NAMED = 8  # so many are named in one message
COLLECTIVE = re.compile(r"gloo|nccl", re.IGNORECASE)


class Heartbeat:
    """Every process tells the others that it lives; one that falls silent is named, and nobody waits for ever.

    group      of gloo over all processes, used once, to tell where the store is; may be None for one process,
               which has nobody to watch
    interval   seconds between two signs of life
    patience   seconds of silence after which this process ends itself, whatever its main thread waits for

    Make one in every process at the same point, and call `stop` at the clean end only: a process that leaves
    without it is missed. If rank 0 goes, it alone is named, for it knew of the others.
    Raises SprintError if the processes do not find each other within a minute.
    """

    def __init__(
        self,
        rank: int,
        processes: int,
        group: ProcessGroup | None,
        interval: float = 1.0,
        patience: float = 30.0,
    ):
        self.rank, self.processes = rank, processes
        self.interval, self.patience = interval, patience
        self._names = {rank: f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"}
        self._lock = threading.Lock()  # of the clock, the names and who was heard
        self._clock = WakingClock(2 * interval)
        self._heard: dict[int, float] = {}  # when a rank gave its last sign, by our clock
        self._seen: dict[str, bytes] = {}  # what the store held when we last looked
        self._beat = 0
        self._last_word = ""
        self._leaving = threading.Event()
        self._talker = threading.Thread(target=self._talk, name="heartbeat", daemon=True)
        if processes > 1:
            self._store = self._meet(group)
            self._talker.start()
            threading.Thread(target=self._watch, name="heartbeat-watch", daemon=True).start()
            atexit.register(self._leave, "")  # a thread must not meet an interpreter that is half gone

    def silent(self, seconds: float) -> list[str]:
        """Who has given no sign for so long: "rank 3 (node7, process 4242)", with its last words if it had any.

        Known on rank 0 for any time; elsewhere for rank 0, and for those whom rank 0 has found late.
        """
        return [name for name, _ in self._silent(seconds).values()]

    def stop(self) -> None:
        """The clean end of this process: the others do not miss it. Rank 0 waits until they have read that."""
        self._leave(LEFT)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Around the training loop: a collective that fails because a process has gone says which one.

        Such an error becomes a SprintError, once it is clear who is silent, in up to `CERTAIN` intervals; if
        nobody is, it is raised as it came, and so is any other error. The others learn of it as last words.
        """
        try:
            yield
        except BaseException as error:
            names = self._who_is_gone() if is_of_a_collective(error) else []
            self._leave(LEFT if names else FAILED + summary(error))
            if names:
                raise SprintError(farewell(names)) from error
            raise

    def _who_is_gone(self) -> list[str]:
        """The silent, as soon as they are known to be; nobody if all are heard for `CERTAIN` intervals."""
        until = time.monotonic() + CERTAIN * self.interval
        while self._heard and time.monotonic() < until:
            if names := self.silent(LATE * self.interval):
                return names
            time.sleep(self.interval / 10)
        return []

    def _silent(self, seconds: float) -> dict[int, tuple[str, float]]:
        """rank -> its name and how long it has been silent"""
        with self._lock:
            now = self._clock()
            silences = {rank: now - heard for rank, heard in sorted(self._heard.items())}
            return {rank: (self._names[rank], s) for rank, s in silences.items() if s >= seconds}

    # ---- the two threads ------------------------------------------------------------------------------

    def _talk(self) -> None:
        """All that is said to the store, in one thread: a call hangs when rank 0 is stopped, and holds the store."""
        exchange = self._exchange_as_host if self.rank == 0 else self._exchange_as_guest
        try:
            going = True
            while going and not self._leaving.wait(self.interval):
                going = exchange()
            if going and self._last_word:
                self._say(self._last_word)
                if self.rank == 0:
                    self._close()
        except RuntimeError:  # the connection is closed: the store has gone, and rank 0 with it
            with self._lock:
                if self.rank != 0:
                    self._heard[0] = self._clock() - LATE * self.interval

    def _watch(self) -> None:
        """Ends this process when another has been silent for too long; never touches the store, so never hangs."""
        while not self._leaving.wait(self.interval):
            if names := self.silent(self.patience):
                with suppress(OSError):  # nobody may be left to read it
                    os.write(2, f"sprint: rank {self.rank}: {farewell(names)}\n".encode())
                self._leave(LEFT)
                os._exit(EXIT_CODE)

    def _leave(self, last_word: str) -> None:
        """End the exchange with a word to the others, or without any; only the first call does something."""
        atexit.unregister(self._leave)
        if self._talker.is_alive():
            self._last_word = self._last_word or last_word
            self._leaving.set()
            self._talker.join(CERTAIN * self.interval)

    # ---- what is said ---------------------------------------------------------------------------------

    def _meet(self, group: ProcessGroup) -> TCPStore:
        """Open the store on rank 0, tell the others its port, wait until rank 0 has met them all."""
        host, port = os.environ.get("MASTER_ADDR", socket.gethostname()), torch.zeros(1, dtype=torch.int64)
        others = range(1, self.processes)
        try:
            if self.rank == 0:
                store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=CONNECT)
                port[0] = store.port
            torch.distributed.broadcast(port, src=0, group=group)
            if self.rank != 0:
                store = TCPStore(host, int(port), wait_for_workers=False, timeout=CONNECT)
            store.multi_set([f"{self.rank}/name", f"{self.rank}/beat"], [self._names[self.rank], "0"])
            met = others if self.rank == 0 else (0,)
            names = store.multi_get([f"{rank}/name" for rank in met])
            if self.rank == 0:
                self._publish(store)
            store.wait([BULLETIN])
        except DistError as error:
            where = f"the store of rank 0 at {host}:{int(port)}"
            raise SprintError(
                f"rank {self.rank}: not all {self.processes} processes reached {where} within "
                f"{CONNECT.seconds} s; let their hosts connect to each other on any port"
            ) from error
        self._names |= {rank: name.decode() for rank, name in zip(met, names, strict=True)}
        self._heard = dict.fromkeys(met, self._clock())
        return store

    def _say(self, word: str) -> None:
        self._store.set(f"{self.rank}/beat", word)

    def _exchange_as_host(self) -> bool:
        self._listen()
        self._publish(self._store)
        return True

    def _listen(self) -> list[bytes]:
        """Note which counters have moved.  -> what the others last said"""
        keys = [f"{rank}/beat" for rank in range(1, self.processes)]
        words = self._store.multi_get(keys)
        with self._lock:
            now = self._clock()
            for rank, (key, word) in enumerate(zip(keys, words, strict=True), start=1):
                if word != self._seen.get(key):
                    self._seen[key] = word
                    self._note(rank, word.decode(), now)
        return words

    def _note(self, rank: int, word: str, now: float) -> None:
        """A new word of a rank: a higher count, its end, or its last words, after which it counts as silent."""
        if word == LEFT:
            self._heard.pop(rank, None)
        elif word.startswith(FAILED):
            self._names[rank] += f", which {word}"
            self._heard[rank] = now - LATE * self.interval
        else:
            self._heard[rank] = now

    def _publish(self, store: TCPStore, ending: bool = False) -> None:
        self._beat += 1
        late = self._silent(LATE * self.interval)
        store.set(BULLETIN, json.dumps({"beat": self._beat, "late": late, "ending": ending}))

    def _close(self) -> None:
        """The last bulletin, which names rank 0 if it failed; then the store stays until all have read it."""
        with self._lock:
            self._note(0, self._last_word, self._clock())
        self._publish(self._store, ending=True)
        until = time.monotonic() + LATE * self.interval
        while self._readers() and time.monotonic() < until:
            time.sleep(self.interval / 20)

    def _readers(self) -> set[int]:
        """The ranks that live and still count, so have not read that this was the last bulletin."""
        counting = {rank for rank, word in enumerate(self._listen(), start=1) if word.isdigit()}
        return counting - self._silent(LATE * self.interval).keys()

    def _exchange_as_guest(self) -> bool:
        """Count up and read the bulletin.  -> False when it was the last one"""
        self._beat += 1
        self._say(str(self._beat))
        text = self._store.get(BULLETIN)
        if text == self._seen.get(BULLETIN):
            return True
        self._seen[BULLETIN] = text
        news = json.loads(text)
        late = {int(rank): fact for rank, fact in news["late"].items() if int(rank) != self.rank}
        with self._lock:
            now = self._clock()
            self._names |= {rank: name for rank, (name, _) in late.items()}
            self._heard = {} if news["ending"] else {0: now}
            self._heard |= {rank: now - seconds for rank, (_, seconds) in late.items()}
        if news["ending"]:
            self._say(LEFT)
        return not news["ending"]


class WakingClock:
    """Seconds of this process's waking life: while it is stopped or suspended, it cannot tell who is silent.

    longest   seconds that may pass between two looks at the clock; what is beyond them was spent asleep
    """

    def __init__(self, longest: float):
        self.longest = longest
        self._looked, self._seconds = time.monotonic(), 0.0

    def __call__(self) -> float:
        now = time.monotonic()
        self._seconds += min(now - self._looked, self.longest)
        self._looked = now
        return self._seconds


def is_of_a_collective(error: BaseException) -> bool:
    """True for what torch.distributed raises: its own classes, and plain RuntimeErrors that name the library."""
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and COLLECTIVE.search(str(error)) is not None
    )


def summary(error: BaseException) -> str:
    """The kind of error and its first line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:300]


def farewell(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    who = ", ".join(names[:NAMED]) + more
    return f"lost {who}, so this process stops too; the same command goes on from the last checkpoint"
