import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sprint.data.batch import parts
from sprint.engine import Engine, take, to_device
from sprint.errors import SprintError
from sprint.models.student import Student
from sprint.models.taps import TappedTeacher
from sprint.models.view import DENSE_TIME, TrigFlowView
from sprint.recipe import Precision
from tests.tiny import tiny_batch, tiny_network

T = torch.tensor([0.5, 0.5 + 1e-4])
BEFORE_NORM = re.compile(r"(pointwise|residual)\.0\.bias")  # batch norm undoes it: its gradient is rounding


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


def test_parts_cut_a_batch_and_zero_does_not():
    assert list(parts(8, 3)) == [slice(0, 3), slice(3, 6), slice(6, 8)]
    assert list(parts(8, 0)) == [slice(0, 8)]
    assert list(parts(2, 16)) == [slice(0, 2)]


def test_take_keeps_the_kind_and_cuts_every_tensor():
    pair = Pair(torch.arange(5), torch.arange(10).reshape(5, 2))
    for where in (slice(1, 3), range(1, 3)):
        cut = take(pair, where)
        assert type(cut) is Pair
        assert cut.a.tolist() == [1, 2] and cut.b.tolist() == [[2, 3], [4, 5]]
    assert to_device(pair, torch.device("meta")).b.shape == (5, 2)


def test_one_process_has_the_whole_batch(engine):
    assert engine.share(8) == range(8)
    assert engine.processes == 1 and engine.main_process
    assert engine.average(torch.tensor(3.0)).item() == 3.0
    assert engine.agree(True) is True and engine.agree(False) is False


def test_shares_are_consecutive_and_uneven_batches_refused(engine, monkeypatch):
    monkeypatch.setattr(Engine, "processes", 4)
    assert engine.share(8) == range(0, 2)
    with pytest.raises(SprintError, match="batch size 6 does not divide over 4 processes"):
        engine.share(6)


def test_processes_that_are_not_there_are_an_error(engine, monkeypatch):
    """What `accelerate launch --cpu --num_processes 2` silently does."""
    monkeypatch.setenv("ACCELERATE_NUM_PROCESSES", "2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SprintError, match="asked for 2 processes, running in 1"):
        Engine(Precision.fp32)


def test_trainable_is_float32_and_frozen_takes_no_gradient(engine):
    network = engine.trainable(tiny_network().to(torch.bfloat16))
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    frozen = engine.frozen(tiny_network().train())
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert {p.dtype for p in frozen.parameters()} == {torch.float32}


# ---- bf16 ---------------------------------------------------------------------------------------------


def embedding_of(network, *conditions):
    """The time embedding that a forward under autocast computes for T."""
    seen = []
    handle = network.time_embed.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    x_hat, text, mask = tiny_batch(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        TrigFlowView(network, DENSE_TIME)(x_hat, T, text, mask, *conditions)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("role", ["trainable", "frozen"])
def test_bf16_keeps_the_time_embedding_in_float32(bf16_engine, role):
    network = getattr(bf16_engine, role)(tiny_network())
    embedded = embedding_of(network)
    assert embedded.dtype == torch.float32
    exact = embedding_of_float32(tiny_network())
    torch.testing.assert_close(embedded, exact, rtol=1e-6, atol=1e-6)
    assert not torch.equal(embedded[0], embedded[1])


def embedding_of_float32(network):
    with torch.no_grad():
        t_fm = torch.sin(T) / (torch.sin(T) + torch.cos(T))
        return network.time_embed(t_fm, hidden_dtype=torch.float32, batch_size=2)[1]


def test_without_the_shield_neighbouring_times_are_one_in_bf16():
    """That the test above can fail."""
    embedded = embedding_of(tiny_network())
    assert embedded.dtype == torch.bfloat16


def test_bf16_student_is_close_to_float32_and_its_gradients_are_float32(bf16_engine):
    torch.manual_seed(0)
    student = bf16_engine.trainable(Student(tiny_network(guidance_embeds=True)))
    x_hat, text, mask = tiny_batch(2)
    guidance = torch.tensor([4.0, 5.0])
    with bf16_engine.autocast():
        F = student(x_hat, T, text, mask, guidance)
        logvar = student.log_variance(T, guidance)
    exact = Student(tiny_network(guidance_embeds=True))(x_hat, T, text, mask, guidance)
    assert F.dtype == torch.float32 and logvar.dtype == torch.float32
    assert 1e-5 < ((F - exact).norm() / exact.norm()).item() < 0.1
    F.square().mean().backward()
    assert {p.grad.dtype for p in student.network.parameters()} == {torch.float32}


def test_frozen_bf16_holds_half_the_memory_but_for_time(bf16_engine):
    network = bf16_engine.frozen(tiny_network())
    kinds = {name: p.dtype for name, p in network.named_parameters()}
    assert all((dtype == torch.float32) == name.startswith("time_embed.") for name, dtype in kinds.items())
    x_hat, text, mask = tiny_batch(2)
    x_hat.requires_grad_()
    with bf16_engine.autocast():
        (features,) = TappedTeacher(TrigFlowView(network, DENSE_TIME), (0,))(x_hat, T, text, mask)
    features.square().mean().backward()
    assert features.dtype == torch.float32 and x_hat.grad.norm() > 0


# ---- several processes ----------------------------------------------------------------------------------


def torchrun(script: str, processes: int, *arguments: str) -> None:
    """Run tests/SCRIPT in so many gloo processes; its own asserts and output are the result."""
    root = Path(__file__).parents[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--master_port={port}", str(root / "tests" / script), *arguments]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


def test_two_processes_train_as_one(tmp_path, engine):
    """Three steps of stage 1, four of stage 2 (G, D, G, D), without misaligned pairs, whose roll is local.

    A local batch of four gives virtual groups of four real and four generated samples: those that one
    process with eight has.
    """
    from tests.two_processes import three_steps_of_each_stage

    torchrun("two_processes.py", 2, str(tmp_path))
    theirs = torch.load(tmp_path / "result.pt", weights_only=True)
    ours = three_steps_of_each_stage(engine)
    assert theirs["processes"] == 2
    for name in ("adapt", "distill"):
        assert len(ours[name]["losses"]) >= 3
        assert theirs[name]["losses"] == pytest.approx(ours[name]["losses"], rel=1e-5, abs=1e-6)
        for key, weight in ours[name]["weights"].items():
            if not BEFORE_NORM.search(key):
                # AdamW moves a weight by about 1e-3 a step, however small its gradient
                torch.testing.assert_close(theirs[name]["weights"][key], weight, rtol=0, atol=3e-5)
