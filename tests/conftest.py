"""Fixtures that several test files share. The networks and batches themselves are in `tests.tiny`."""

import os
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.models.normalization import RMSNorm

from sprint.engine.engine import Engine
from sprint.recipe.schema import Precision

# A shell starts background jobs with SIGINT ignored, and children inherit that; the tests of Ctrl-C need it heard.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Networks this small lose more to threads than they gain; tools/kernels.py asks for two all the same.
torch.set_num_threads(int(os.environ.get("SPRINT_TEST_THREADS", "1")))


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
