"""Run by test_ending.py: each way to end, in a process of its own, in a group and in none. Prints what came of it.

A line of JSON for each: [in a group, way, exit code, standard output, standard error].
"""

import atexit
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from sprint.base.ending import run_to_end


class Witness:
    """Tells that Python takes itself apart, when what this module has imported is gone."""

    write = staticmethod(os.write)

    def __del__(self) -> None:
        self.write(1, b"taken apart\n")


witnesses: list[Witness] = []


def fail() -> None:
    raise ValueError("a defect")


WAYS = {
    "return": lambda: None,
    "exit": sys.exit,
    "exit 3": lambda: sys.exit(3),
    "exit with words": lambda: sys.exit("words"),
    "fail": fail,
}


def late_thread() -> None:
    time.sleep(0.2)
    os.write(1, b"thread\n")


def last_things(in_group: bool, way: Callable[[], None]) -> None:
    """Leave behind a thread, something for the end and text that is not yet written; then end."""
    if in_group:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.all_reduce(torch.ones(2))
    threading.Thread(target=late_thread).start()
    atexit.register(print, "at exit")
    way()


def outcome(in_group: bool, way: str) -> list:
    """Fork, and see how the new process ends; that one never returns from here."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            witnesses.append(Witness())
            run_to_end(lambda: last_things(in_group, WAYS[way]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [os.pread(file.fileno(), 1_000_000, 0).decode() for file in (out, err)]
    return [in_group, way, code, *texts]


if __name__ == "__main__":
    outcomes = [outcome(in_group, way) for in_group in (False, True) for way in WAYS]
    print("\n".join(map(json.dumps, outcomes)))
