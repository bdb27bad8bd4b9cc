"""Run by test_heartbeat.py. A line on standard input is a case: "PROCESSES FOLDER INTERVAL PATIENCE WORK".

For each it forks into so many gloo processes, so that torch is imported once. Lines on standard output, from any of
them: "ready RANK PID" after the first collective, "silent RANK NAMES" at a clean end, "ended RANK CODE". What rank R
writes to standard error is in FOLDER/R.
"""

import os
import sys
import time

import torch
import torch.distributed as dist

from sprint.base.ending import run_to_end
from sprint.base.errors import SprintError
from sprint.engine.heartbeat import LATE, Heartbeat


def fork() -> tuple[int, list[str]]:
    """Returns in each of the new processes, with its rank and the case; this one stays behind until they end."""
    for line in sys.stdin:
        processes, folder, *_ = case = line.split()
        ranks = {}
        for rank in range(int(processes)):
            child = os.fork()
            if child == 0:
                os.dup2(os.open(f"{folder}/{rank}", os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())
                return rank, case
            ranks[child] = rank
        while ranks:
            child, status = os.wait()
            tell("ended", ranks.pop(child), os.waitstatus_to_exitcode(status))
    sys.exit()


def tell(what: str, rank: int, fact: object) -> None:
    os.write(1, f"{what} {rank} {fact}\n".encode())  # in one piece, where `print` may mix with the others'


def step() -> None:
    dist.all_reduce(torch.ones(4))
    time.sleep(0.02)


def reduce() -> None:
    while True:
        step()


def hang() -> None:
    time.sleep(3600)


def fail(rank: int) -> None:
    step()  # all are ready before one fails
    if dist.get_rank() == rank:
        raise RuntimeError("a defect of the caller's own")
    reduce()


def end() -> None:
    """One rank after the other, once all are ready."""
    step()
    time.sleep(0.3 * dist.get_rank())


WORK = {"reduce": reduce, "hang": hang, "end": end, "fail-0": lambda: fail(0), "fail-1": lambda: fail(1)}


def run(rank: int, processes: int, folder: str, interval: float, patience: float, work: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    heartbeat = Heartbeat(rank, processes, dist.group.WORLD, interval, patience)
    with heartbeat.explained():
        step()
        tell("ready", rank, os.getpid())
        WORK[work]()
    tell("silent", rank, heartbeat.silent(LATE * interval))
    heartbeat.stop()


def main() -> None:
    rank, (processes, folder, interval, patience, work) = fork()
    try:
        run(rank, int(processes), folder, float(interval), float(patience), work)
    except SprintError as error:
        sys.exit(f"SprintError: {error}")


if __name__ == "__main__":
    run_to_end(main)
