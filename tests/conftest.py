"""Fixtures that several test files share. The networks and batches themselves are in `tests.tiny`."""

import gc
import os
import signal

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from diffusers.models.normalization import RMSNorm

from sprint.engine.engine import Engine
from sprint.recipe.schema import Precision

# Plugins that some test files import from, too: their asserts speak whichever comes first.
pytest.register_assert_rewrite(
    "tests.cli.fixtures", "tests.evaluate.fixtures", "tests.weights.convert_fixtures"
)
# A shell starts background jobs with SIGINT ignored, and children inherit that; the tests of Ctrl-C need it heard.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Networks this small lose more to threads than they gain; tools/kernels asks for two all the same. Processes that
# tests start hear of it by the variable.
torch.set_num_threads(int(os.environ.get("SPRINT_TEST_THREADS", "1")))
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What takes seconds: processes of their own, and whole runs. A test that asks for one of these fixtures, or itself
# calls one of these functions, is marked slow, besides those that say so themselves.
PROCESSES = {"forked", "torchrun", "spawn", "Popen", "subprocess", "multiprocessing", "in_fresh_process"}
PROCESSES |= {"in_processes", "launcher", "theirs", "zygote", "fake", "memory_of_a_fresh_process"}
RUNS = {
    "finished",
    "few",
    "uninterrupted",
    "under_engines",
    "whole_batch",
    "counts",
    "case_on_cpu",
    "without_code",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is slow, and puts files with such tests first: workers that take files in turn end together."""
    slow_files = set()
    for item in items:
        if (PROCESSES | RUNS) & {*item.fixturenames, *item.function.__code__.co_names}:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow"):
            slow_files.add(item.path)
    items.sort(key=lambda item: item.path not in slow_files)  # stable


def pytest_collection_finish() -> None:
    """What is imported by now stays: the tests' own `gc.collect()` need not look through it each time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_group_is_left():
    """A process group that a test leaves behind would fail another test, whichever this worker takes next."""
    yield
    assert not (dist.is_available() and dist.is_initialized()), "this test leaves a process group behind"


@pytest.fixture
def engine():
    """One process in fp32. accelerate keeps its state by process, so it is reset around the test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Engine(Precision.fp32)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def bf16_engine():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Engine(Precision.bf16)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def true_float64(monkeypatch):
    """diffusers' linear attention, RMSNorm and sinusoids step down to float32; here they do not."""

    def rms_norm(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(RMSNorm, "forward", rms_norm)
