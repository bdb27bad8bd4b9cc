import subprocess
import sys

import pytest

from sprint.base.errors import SprintError
from sprint.train.folder import claim


def test_claim_refuses_another_recipe_and_allows_the_same_again(tmp_path):
    run = tmp_path / "runs" / "tiny"
    claim(run, "a" * 12)
    claim(run, "a" * 12)
    with pytest.raises(SprintError, match=r"another recipe \(aaaaaaaaaaaa, this one is bbbbbbbbbbbb\)"):
        claim(run, "b" * 12)
    assert (run / "recipe.hash").read_text() == "a" * 12 + "\n"


def test_claim_on_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SprintError, match=r"cannot use .*file for a run: File exists"):
        claim(tmp_path / "file", "a")


CLAIM = """
import sys
from pathlib import Path
from sprint.train.folder import claim
from sprint.base.errors import SprintError
try:
    claim(Path(sys.argv[1]), "0123456789ab")
    print("claimed")
    sys.stdin.read()
except SprintError as error:
    print(error)
"""


def test_second_process_is_refused_until_the_first_ends(tmp_path):
    def start():
        return subprocess.Popen(
            [sys.executable, "-uc", CLAIM, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    with start() as first:
        assert first.stdout.readline() == "claimed\n"
        with start() as second:
            refused = second.communicate()[0]
        assert refused.startswith(f"{tmp_path} is in use by process {first.pid}")
        first.kill()
    with start() as third:
        assert third.communicate()[0] == "claimed\n"
