"""A run goes on under another engine, or with another number of processes: one checkpoint, every way."""

import pytest
import torch
from accelerate.state import AcceleratorState

from sprint.engine.engine import Engine
from sprint.recipe.schema import Precision
from tests.engine.resume_processes import (
    END,
    MIDDLE,
    START,
    arrive,
    leave,
    stage_of,
    steps,
)
from tests.launch import forked
from tests.tiny import tiny_network
from tests.tolerance import growing, of_network

UPDATE = of_network(tiny_network(seed=3), passes=4)  # forward, tangent, and backward twice
CASES = ["ddp", "fsdp2", "zero2", "zero3", "fsdp2-came"]


@pytest.fixture(scope="module")
def engine():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Engine(Precision.fp32)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def uninterrupted(engine, tmp_path_factory):
    """By optimizer: the losses of one process from START to END. Its checkpoints at START are in the folder."""
    pytest.importorskip("deepspeed")
    folder, losses = tmp_path_factory.mktemp("resume"), {}
    for optimizer in ("adamw", "came"):
        stage = stage_of(engine, came=optimizer == "came")
        steps(stage, engine, 0, START)
        leave(stage, engine, folder / optimizer)
        losses[optimizer] = steps(stage, engine, START, END)
    return folder, losses


@pytest.fixture(scope="module")
def in_processes(uninterrupted):
    """By case: the losses of two processes from START to MIDDLE. Their checkpoints are in the folder."""
    folder, _ = uninterrupted
    forked("tests.engine.resume_processes", 2, str(folder), *CASES)
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_go_on_from_one_and_one_from_two(case, in_processes, uninterrupted, engine):
    folder, losses = uninterrupted
    optimizer = "came" if case.endswith("came") else "adamw"
    expected = losses[optimizer]
    assert in_processes[case] == growing(expected[: MIDDLE - START], UPDATE)
    stage = stage_of(engine, came=optimizer == "came")
    arrive(stage, engine, folder / case)
    assert stage.generator_updates == MIDDLE // 2
    assert steps(stage, engine, MIDDLE, END) == growing(expected[MIDDLE - START :], UPDATE, MIDDLE - START)


def test_losses_of_a_fresh_stage_are_others(uninterrupted, engine):
    """That the test above can fail: without what the checkpoint holds the losses differ."""
    _, losses = uninterrupted
    fresh = steps(stage_of(engine, came=False), engine, START, MIDDLE)
    assert fresh != growing(losses["adamw"][: MIDDLE - START], UPDATE)
