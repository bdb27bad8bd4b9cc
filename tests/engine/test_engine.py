import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from sprint.base.errors import SprintError
from sprint.data.batch import parts
from sprint.engine.batches import take, to_device
from sprint.engine.engine import Engine
from sprint.engine.held import Held
from sprint.models.student import Student
from sprint.models.taps import TappedTeacher
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from sprint.recipe.schema import EngineKind, Precision
from sprint.train.distill import DistillStage
from tests.engine.engine_processes import BATCH, both_stages, recipe_for_engines
from tests.launch import forked, torchrun
from tests.tiny import DEPTH, LATENT, tiny_batch, tiny_network, tiny_null, tiny_recipe
from tests.tolerance import assert_close, assert_moved_alike, growing, near, of_autocast, of_network

T = torch.tensor([0.5, 0.5 + 1e-4])
STEPS = 20


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
    assert engine.max_over_ranks(1) == 1
    assert engine.broadcast_from_main(lambda: "word") == "word"
    assert str(engine) == "engine single, 1 process on cpu"


def test_shares_are_consecutive_and_uneven_batches_refused(engine, monkeypatch):
    monkeypatch.setattr(Engine, "processes", 4)
    assert engine.share(8) == range(0, 2)
    with pytest.raises(SprintError, match="batch_size = 6 does not divide over 4 processes"):
        engine.share(6)


def test_processes_that_are_not_there_are_an_error(engine, monkeypatch):
    """What `accelerate launch --cpu --num_processes 2` silently does."""
    monkeypatch.setenv("ACCELERATE_NUM_PROCESSES", "2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SprintError, match="asked for 2 processes, running in 1"):
        Engine(Precision.fp32)


def test_accelerate_launch_that_starts_one_process_is_an_error():
    """With --cpu --num_processes 2 it does, and says nothing."""
    program = (
        "from sprint.engine.engine import Engine; from sprint.recipe.schema import EngineKind, Precision;"
    )
    program += "Engine(Precision.fp32, EngineKind.ddp)"
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--no_python",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    command = [*launcher, sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "accelerate launch has started 1 process" in result.stderr


def test_trainable_is_float32_and_frozen_takes_no_gradient(engine):
    network = tiny_network().to(torch.bfloat16)
    engine.wrap(network, tiny_recipe().adapt.optimizer)
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


@pytest.mark.parametrize("role", ["trained", "frozen"])
def test_bf16_keeps_the_time_embedding_in_float32(bf16_engine, role):
    network = tiny_network()
    if role == "trained":
        bf16_engine.wrap(network, tiny_recipe().adapt.optimizer)
    else:
        bf16_engine.frozen(network)
    embedded = embedding_of(network)
    assert embedded.dtype == torch.float32
    exact = embedding_of_float32(tiny_network())
    assert_close(embedded, exact, of_network(network.time_embed))
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
    student = Student(tiny_network(guidance_embeds=True))
    bf16_engine.wrap(student, tiny_recipe().adapt.optimizer)
    x_hat, text, mask = tiny_batch(2)
    guidance = torch.tensor([4.0, 5.0])
    with bf16_engine.autocast():
        F = student(x_hat, T, text, mask, guidance)
        logvar = student.log_variance(T, guidance)
    exact = Student(tiny_network(guidance_embeds=True))(x_hat, T, text, mask, guidance)
    assert F.dtype == torch.float32 and logvar.dtype == torch.float32
    assert 1e-5 < ((F - exact).norm() / exact.norm()).item() < of_autocast(student)
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


@pytest.fixture(scope="module")
def whole_batch():
    """One process with all of it: both stages, with AdamW; by the student's depth."""
    AcceleratorState._reset_state(reset_partial_state=True)
    engine = Engine(Precision.fp32)
    found = {depth: both_stages(engine, recipe_for_engines(depth=depth), STEPS) for depth in (0, DEEP)}
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


DEEP = 4  # blocks of a student deeper than its teacher; 0: as deep
CASES = {  # processes: ENGINE:MICRO_BATCH:SHARD_SIZE:TEACHER:DEPTH
    2: [
        *("ddp:4:0:whole:0", "fsdp2:4:0:sharded:0", "zero2:4:0:whole:0", "zero3:0:0:sharded:0"),
        f"fsdp2:4:0:whole:{DEEP}",
    ],
    4: ["fsdp2:0:2:whole:0"],
}
# DDP's processes are torchrun's own, so that its environment is met; the others' are given the same.
LAUNCHES = [(torchrun, 2, CASES[2][:1]), (forked, 2, CASES[2][1:]), (forked, 4, CASES[4])]


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory):
    """What each case found, by (processes, case)."""
    pytest.importorskip("deepspeed")
    found = {}
    for launch, processes, cases in LAUNCHES:
        folder = tmp_path_factory.mktemp("engines")
        launch("tests.engine.engine_processes", processes, str(folder), str(STEPS), *cases)
        results = torch.load(folder / "result.pt", weights_only=True)
        found |= {(processes, case): result for case, result in results.items()}
    return found


@pytest.mark.parametrize(("processes", "case"), [(n, case) for n, cases in CASES.items() for case in cases])
def test_every_engine_trains_as_one_process_does(processes, case, in_processes, whole_batch):
    """The first 20 steps of stage 2, G and D taking turns, misaligned pairs and micro-batches included."""
    theirs, (kind, *_, depth) = in_processes[processes, case], case.split(":")
    alone = whole_batch[int(depth)]
    copies = ", 2 copies of the weights" if processes == 4 else ""
    assert theirs["engine"] == f"engine {kind}, {processes} processes on cpu{copies}"
    assert len(alone["distill"]["losses"]) == STEPS
    update = of_network(
        tiny_network(num_layers=int(depth) or DEPTH), passes=4
    )  # forward, tangent, and backward twice
    for name in ("adapt", "distill"):
        ours = alone[name]
        assert theirs[name]["losses"] == growing(ours["losses"], update)
        way = sum(getattr(recipe_for_engines(), name).optimizer.lr for _ in ours["losses"])
        assert_moved_alike(theirs[name]["weights"], ours["weights"], way, update * len(ours["losses"]))


def test_the_losses_would_show_another_batch(whole_batch):
    """That the test above can fail: swap two samples of the first batch."""
    engine, recipe = Engine(Precision.fp32), recipe_for_engines()
    stage = DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)
    order = [1, 0, *range(2, BATCH)]
    batch = type(tiny_batch(BATCH))(*(tensor[order] for tensor in tiny_batch(BATCH)))
    loss = stage.update(0, batch).read(engine)["loss"]
    first = whole_batch[0]["distill"]["losses"][0]
    assert loss != near(first, of_network(tiny_network(), passes=4), scale=max(1, abs(first)))


def test_engines_for_one_and_for_several(engine, monkeypatch):
    alone = Engine(Precision.fp32, EngineKind.zero3)
    assert str(alone) == "engine single, 1 process on cpu (zero3 has nobody to share with)"
    assert type(alone.wrap(tiny_network(), tiny_recipe().adapt.optimizer)) is Held
    monkeypatch.setattr(Engine, "processes", 2)
    with pytest.raises(SprintError, match="engine = single, but 2 processes are running; set engine=ddp"):
        engine._check_processes(2)
    with pytest.raises(SprintError, match="shard_size = 3 does not divide 2 processes"):
        engine._mesh(3)
