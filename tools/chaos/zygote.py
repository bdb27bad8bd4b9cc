"""A process that has imported everything, and forks a `sprint` command for every line on its standard input.

Python needs seconds to import torch and diffusers, and a run that is killed forty times would spend most of them so.
What is forked is the command itself, in a session of its own: it ends as it always does, and a kill
takes all of it. Nothing here starts a thread or a process group before the fork.

A line is JSON: {"argv", "folder", "environment", "output", "largest_file"}. It is answered with a line, the process's
id. When that has ended, the file OUTPUT.end holds {"code", "cpu_seconds"}; a negative code is the signal that
ended it. When standard input ends, so does everything that was started.

Started by tools/chaos/runs.py; not a program for people.
"""

import json
import os
import resource
import select
import signal
import sys
from pathlib import Path

import sprint.cli.main
import sprint.data.kinds.folder
import sprint.data.kinds.webdataset
import sprint.train.run
from sprint.base.files import write_whole

PAUSE = 0.01  # seconds between two looks at who has ended


def serve() -> dict:
    """Forks until there is nothing more to do. Returns in each of the new processes, with its order."""
    outputs: dict[int, str] = {}  # of those at work
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], PAUSE)
        if ready:
            line = sys.stdin.readline()
            if not line:
                break
            order = json.loads(line)
            child = os.fork()
            if child == 0:
                return order
            outputs[child] = order["output"]
            os.write(1, b"%d\n" % child)
        reap(outputs)
    for child in outputs:
        os.kill(child, signal.SIGKILL)
    os._exit(0)  # at once: there is nothing of its own to end


def reap(outputs: dict[int, str]) -> None:
    while outputs:
        child, status, usage = os.wait4(-1, os.WNOHANG)
        if child == 0:
            return
        end = {"code": os.waitstatus_to_exitcode(status), "cpu_seconds": usage.ru_utime + usage.ru_stime}
        write_whole(Path(outputs.pop(child) + ".end"), json.dumps(end))


def become(order: dict) -> None:
    """The process that a shell would have started."""
    os.setsid()
    os.chdir(order["folder"])
    os.environ.update(order["environment"])
    output = os.open(order["output"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(descriptor, stream)
    if order["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"],) * 2)


if __name__ == "__main__":
    order = serve()
    become(order)
    sprint.cli.main.command(order["argv"])
