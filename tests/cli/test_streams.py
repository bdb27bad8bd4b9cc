"""Standard streams that nobody reads any more, and systems that are none of ours."""

import os
import subprocess
import sys

import pytest

from tests.cli.cases import ROOT

SPRINT = [sys.executable, "-m", "sprint"]
LOST = f"{sys.executable} -m sprint"

# a program that loses its streams, and goes on
GOES_ON = """
import os, sys
from tqdm import tqdm
from sprint.base.streams import outlive_readers
outlive_readers()
for i in tqdm(range(50), file=sys.stderr, mininterval=0):
    print("line", i, flush=True)
print("last words", file=sys.stderr)
os.write(2, b"a library's\\n")
open(sys.argv[1], "w").write("done")
"""


@pytest.mark.parametrize(
    "streams", [">&- 2>&-", "2>/dev/full", "| true", "2> >(true)", "> >(exec true) 2> >(exec true)"]
)
def test_a_program_goes_on_without_its_readers(tmp_path, streams):
    command = f'{sys.executable} -c "$0" done {streams}; '
    subprocess.run(
        ["bash", "-c", f"{command} exit ${{PIPESTATUS[0]}}", GOES_ON], cwd=tmp_path, env=_env(), check=True
    )
    assert (tmp_path / "done").read_text() == "done"


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("recipes | head -n 0", 0, ""),
        ("recipes 2>&1 > /dev/full", 2, "sprint: standard output: No space left on device\n"),
        ("recipes >&-", 0, ""),
        ("recipes nowhere 2>&-", 2, ""),
    ],
)
def test_lost_streams_end_no_verb(command, code, says):
    done = subprocess.run(
        ["bash", "-c", f"{LOST} {command}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (code, says)


def test_windows_is_told_in_one_line():
    hidden = "import sys; sys.modules |= dict.fromkeys(['fcntl', 'resource']); "
    started = "from sprint.cli.main import command; sys.platform = 'win32'; command(['recipes'])"
    done = subprocess.run([sys.executable, "-c", hidden + started], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == "sprint: sprint runs on Linux and macOS, and this is win32; on Windows start it in WSL\n"
    )


def _env() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}
