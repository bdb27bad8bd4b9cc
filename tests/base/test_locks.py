"""A lock is one process's at a time."""

import subprocess
import sys

from sprint.base.locks import lock, locked

HOLD = """
import sys
from pathlib import Path
from sprint.base.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_processes_lock_is_seen_and_ends_with_it(tmp_path):
    path = tmp_path / ".lock"
    with (
        subprocess.Popen(
            [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder,
        open(path, "a") as file,
    ):
        assert holder.stdout.readline() == "held\n"
        assert lock(file, wait=False) is False
        holder.kill()
        holder.wait()
        assert lock(file, wait=False) is True


def test_a_lock_is_free_after_its_lines_and_taken_inside_them(tmp_path):
    with locked(tmp_path / ".lock"), open(tmp_path / ".lock") as other:
        assert lock(other, wait=False) is False
    with open(tmp_path / ".lock") as other:
        assert lock(other) is True
