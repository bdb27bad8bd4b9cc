"""A process that others have met ends as Python would end it, but is not taken apart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODES = {"return": 0, "exit": 0, "exit 3": 3, "exit with words": 1, "fail": 1}
LAST_WORDS = {"exit with words": "words\n", "fail": "ValueError: a defect\n"}


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[bool, str], list]:
    """(in a group, way to end) -> exit code, standard output, standard error"""
    command = [sys.executable, "-m", "tests.base.ending_processes"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    return {(in_group, way): rest for in_group, way, *rest in found}


@pytest.mark.parametrize("way", CODES)
@pytest.mark.parametrize("in_group", [False, True], ids=["alone", "in a group"])
def test_a_process_ends_as_python_ends_it(outcomes, in_group, way):
    code, out, err = outcomes[in_group, way]
    assert code == CODES[way]
    assert out.splitlines() == ["thread", "at exit"] + ["taken apart"] * (not in_group)
    assert err.endswith(LAST_WORDS.get(way, ""))
    assert bool(err) == (way in LAST_WORDS)
