"""Runs that are killed and started again end with the bits of a run that nobody disturbed; `make chaos` tries more."""

from collections.abc import Iterator

import pytest

from tools.chaos.kills import kills
from tools.chaos.lab import Lab, Outcome
from tools.chaos.runs import Size, Zygote

SMALL = Size(adapt=3, distill=4, save_every=2)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


@pytest.mark.parametrize(("processes", "count"), [(1, 3), (2, 2)])
def test_a_killed_run_loses_nothing(zygote, tmp_path, processes, count):
    """With ddp, one of the kills is of a single rank."""
    lab, outcome = Lab(tmp_path, zygote, seed=0, kills=count, size=SMALL), Outcome(f"kills-{processes}")
    try:
        kills(lab, outcome, processes)
    finally:
        lab.clear()
    assert outcome.lost == []
    assert len(outcome.tried) == count
