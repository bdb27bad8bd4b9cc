"""Processes that die, stand still, fail and end, and what the others say of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Timer
from typing import NamedTuple

import pytest
import torch.distributed as dist

from sprint.base.errors import SprintError
from sprint.engine import heartbeat
from sprint.engine.heartbeat import (
    CERTAIN,
    EXIT_CODE,
    LATE,
    Heartbeat,
    WakingClock,
    farewell,
    is_of_a_collective,
)

INTERVAL, PATIENCE = 0.7, 3.0
SLACK = 15.0  # seconds, for a busy machine
AGAIN = "so this process stops too; the same command goes on from the last checkpoint"


class Ranks(NamedTuple):
    """The processes of a case at work."""

    launcher: subprocess.Popen
    folder: Path
    pids: dict[int, int]
    codes: dict[int, int]  # of those that have ended

    def name(self, rank: int) -> str:
        return f"rank {rank} ({os.uname().nodename}, process {self.pids[rank]})"

    def said(self, rank: int) -> str:
        return (self.folder / str(rank)).read_text()

    def wait(self, ranks: set[int]) -> dict[int, int]:
        """rank -> exit code, once these have ended"""
        while ranks - self.codes.keys():
            what, rank, rest = self.launcher.stdout.readline().split(maxsplit=2)
            if what == "ended":
                self.codes[int(rank)] = int(rest)
            else:
                assert rest.strip() == "[]", f"rank {rank} thinks {rest} silent"
        return self.codes

    def kill(self) -> None:
        for rank in self.pids.keys() - self.codes.keys():
            with suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGKILL)
        self.wait(set(self.pids))


@pytest.fixture(scope="module")
def launcher() -> Iterator[subprocess.Popen]:
    """tests/engine/heartbeat_processes.py, waiting for cases; killed after three minutes, whatever it does."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "MASTER_ADDR": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.heartbeat_processes"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    late = Timer(180, os.killpg, (process.pid, signal.SIGKILL))
    late.start()
    yield process
    late.cancel()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@contextmanager
def at_work(
    launcher: subprocess.Popen, work: str, processes: int, folder: Path, patience: float = PATIENCE
) -> Iterator[Ranks]:
    """`processes` ranks, each in the training loop; none is left at the end."""
    print(processes, folder, INTERVAL, patience, work, file=launcher.stdin, flush=True)
    pids = {}
    while len(pids) < processes:
        ready, rank, pid = launcher.stdout.readline().split()
        assert ready == "ready"
        pids[int(rank)] = int(pid)
    ranks = Ranks(launcher, folder, pids, {})
    try:
        yield ranks
    finally:
        ranks.kill()


@pytest.mark.parametrize("victim", [0, 2])
def test_survivors_of_a_killed_rank_name_it(launcher, tmp_path, victim):
    with at_work(launcher, "reduce", 3, tmp_path, patience=60.0) as ranks:
        survivors = {0, 1, 2} - {victim}
        began = time.monotonic()
        os.kill(ranks.pids[victim], signal.SIGKILL)
        codes = ranks.wait(survivors)
        assert time.monotonic() - began < (CERTAIN + LATE) * INTERVAL + SLACK
        for rank in survivors:
            assert codes[rank] == 1
            assert ranks.said(rank).endswith(f"SprintError: lost {ranks.name(victim)}, {AGAIN}\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_waits_for_ever_is_ended(launcher, tmp_path, number):
    """Even if rank 0 stands still, so that calls of its store hang."""
    victim = 1 if number == signal.SIGKILL else 0
    with at_work(launcher, "hang", 2, tmp_path) as ranks:
        other = 1 - victim
        began = time.monotonic()
        os.kill(ranks.pids[victim], number)
        codes = ranks.wait({other})
        assert PATIENCE - INTERVAL < time.monotonic() - began < PATIENCE + CERTAIN * INTERVAL + SLACK
        assert codes[other] == EXIT_CODE
        assert ranks.said(other) == f"sprint: rank {other}: lost {ranks.name(victim)}, {AGAIN}\n"


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_error_of_the_callers_own_is_raised_as_it_is_and_told_to_the_others(launcher, tmp_path, culprit):
    with at_work(launcher, f"fail-{culprit}", 2, tmp_path, patience=60.0) as ranks:
        assert ranks.wait({0, 1}) == {0: 1, 1: 1}
        defect = "RuntimeError: a defect of the caller's own"
        assert ranks.said(culprit).endswith(f"{defect}\n")
        assert "SprintError" not in ranks.said(culprit)
        theirs = f"SprintError: lost {ranks.name(culprit)}, which failed: {defect}, {AGAIN}\n"
        assert ranks.said(1 - culprit).endswith(theirs)


def test_a_clean_end_reports_nobody(launcher, tmp_path):
    """Nor does it write a line or take longer than the last process; `wait` asserts that nobody is silent."""
    with at_work(launcher, "end", 3, tmp_path) as ranks:
        assert ranks.wait({0, 1, 2}) == {0: 0, 1: 0, 2: 0}
        assert [ranks.said(rank) for rank in range(3)] == ["", "", ""]


def test_one_process_watches_nobody():
    alone = Heartbeat(0, 1, None)
    with alone.explained():
        assert alone.silent(0.0) == []
    with pytest.raises(dist.DistError, match="as it came"), alone.explained():
        raise dist.DistNetworkError("as it came")
    alone.stop()


def test_processes_that_do_not_find_each_other_are_told_where_to_look(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "CONNECT", timedelta(seconds=1))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(SprintError, match=r"not all 2 processes reached .* 127\.0\.0\.1:\d+ within 1 s"):
            Heartbeat(0, 2, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_the_clock_stands_while_the_process_does(monkeypatch):
    now = 100.0
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    clock = WakingClock(longest=2.0)
    now = 101.5
    assert clock() == 1.5
    now = 1000.0  # stopped for a quarter of an hour
    assert clock() == 3.5
    now = 1001.0
    assert clock() == 4.5


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (dist.DistBackendError("NCCL error"), True),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
    ],
)
def test_errors_of_collectives_are_known(error, expected):
    assert is_of_a_collective(error) is expected


def test_a_message_does_not_grow_with_the_cluster():
    message = farewell([f"rank {rank} (node, process 1)" for rank in range(512)])
    assert "rank 7 (node, process 1) and 504 more, so" in message
    assert "rank 8 " not in message
