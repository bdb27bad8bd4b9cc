"""What becomes of freed memory."""

import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.slow
def test_freed_memory_is_kept():
    """A freed quarter of a gigabyte stays with the process, and only where that was asked for."""
    program = """
import sys, torch
from sprint.base.cpu import keep_freed_memory, return_freed_memory
def resident():
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmRSS')) // 1024
if sys.argv[1] == 'keep':
    assert keep_freed_memory()
if sys.argv[1] == 'return':
    assert return_freed_memory()
pieces = int(sys.argv[2])
before = resident()
x = [torch.ones(2**26 // pieces) for _ in range(pieces)]
del x
print(resident() - before)
"""

    def left(word: str, pieces: int) -> int:
        command = [sys.executable, "-c", program, word, str(pieces)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert left("keep", 1) > 200 and left("default", 1) < 60 and left("return", 16) < 60  # of 256 MiB
