"""The judgement of bench_engines and what it counts; the engines themselves are tested in test_engine."""

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from sprint.base.errors import SprintError
from sprint.engine.held import RowSharded
from sprint.models.discriminator import DiscriminatorHeads
from sprint.recipe.schema import EngineKind, Optimizer, OptimizerKind, Precision
from sprint.train.plan.engines import count
from tools.bench import engine_cases
from tools.bench import engines as bench_engines
from tools.bench.engine_cases import Case
from tools.bench.engines import judged_losses, judged_memory, largest_difference, missed

ADAPT, DISTILL = [0.25, 0.5], [-6.0, 1.0, -5.0]


# ---- losses -----------------------------------------------------------------------------------------


def test_a_difference_is_relative_where_the_loss_is_above_one():
    assert largest_difference([1.0, -5.0], [1.0, -5.0]) == 0.0
    assert largest_difference([0.25 + 1e-3, -5.0], [0.25, -5.0]) == pytest.approx(1e-3)
    assert largest_difference([0.25, -5.0 + 1e-3], [0.25, -5.0]) == pytest.approx(2e-4)
    assert largest_difference([0.25, math.nan], [0.25, -5.0]) is None
    assert largest_difference([math.nan, 0.25], [-5.0, 0.25]) is None
    with pytest.raises(ValueError):
        largest_difference([0.25], [0.25, -5.0])


def losses_row(case: Case, processes: int = 1, adapt: float = 0.0, distill: float = 0.0) -> dict:
    """As measured, with so much added to the last loss of each stage."""
    found = {"engine": "engine", "adapt": [*ADAPT[:-1], ADAPT[-1] + adapt]}
    found["distill"] = [*DISTILL[:-1], DISTILL[-1] + distill]
    return {"processes": processes} | bench_engines.row_of(case, found)


def test_a_planted_difference_misses_the_goal():
    rows = judged_losses(
        [
            losses_row(Case()),
            losses_row(Case(EngineKind.ddp), 2, distill=4e-5),  # of -5
            losses_row(Case(EngineKind.fsdp2, shard_teacher=True), 2, distill=6e-5),
            losses_row(Case(EngineKind.zero2), 4, adapt=1.1e-5),
            losses_row(Case(EngineKind.zero3), 4, distill=math.nan),
        ]
    )
    assert [row["met"] for row in rows] == [True, True, False, False, False]
    assert rows[1]["difference"] == pytest.approx({"adapt": 0.0, "first": 0.0, "distill": 8e-6})
    assert missed(rows) == ["fsdp2, teacher too on 2", "zero2 on 4", "zero3 on 4"]
    page = bench_engines.losses_table(rows).splitlines()
    assert page[5] == "| zero2 | fp32, adamw | 4 | 4 | 1.1e-05 | 0 | 0 | ≤ 1e-05 | **missed** |"
    assert "not finite" in page[6]
    assert "distill" in rows[0] and "distill" not in rows[1]
    json.dumps(rows, allow_nan=False)


def test_bf16_and_came_have_no_goal_and_references_of_their_own():
    bf16, came = {"precision": Precision.bf16}, {"optimizer": OptimizerKind.came}
    rows = judged_losses(
        [
            losses_row(Case()),
            losses_row(Case(**bf16), distill=0.5),
            losses_row(Case(EngineKind.ddp, **bf16), 2, distill=0.5),
            losses_row(Case(**came), distill=0.1),
            losses_row(Case(micro_batch=4, **came)),
        ]
    )
    assert [row["met"] for row in rows] == [True, None, None, None, None]
    assert [row["difference"]["distill"] for row in rows] == pytest.approx([0, 0, 0, 0, 0.1 / 4.9])
    assert missed(rows) == []


@pytest.mark.parametrize("quick", [False, True])
def test_every_case_has_a_recipe_and_a_reference(quick):
    cases = bench_engines.losses_cases(quick)
    references = [case for case in cases[1] if case.engine is EngineKind.single and not case.micro_batch]
    compared_with = {(case.precision, case.optimizer) for case in references}
    assert len(references) == len(compared_with)
    assert compared_with == {(case.precision, case.optimizer) for each in cases.values() for case in each}
    for processes, each in cases.items():
        assert len(set(each)) == len(each)
        for case in each:
            recipe = engine_cases.losses_recipe(case)
            assert (recipe.engine, recipe.precision) == (case.engine, case.precision)
            assert recipe.adapt.optimizer.kind == recipe.distill.optimizer.kind == case.optimizer
            assert recipe.distill.batch_size // processes % recipe.distill.adversarial.neighbours == 0
    if not quick:
        for processes in (2, 4):
            assert {case.engine for case in cases[processes]} == set(EngineKind) - {EngineKind.single}


def test_a_case_travels_as_json():
    case = Case(EngineKind.fsdp2, 4, 2, True, Precision.bf16, OptimizerKind.came)
    assert Case.of(json.loads(json.dumps(case._asdict()))) == case
    assert str(case) == "fsdp2, shards of 2, teacher too"


# ---- memory -----------------------------------------------------------------------------------------


def memory_row(case: Case, processes: int, held: int, planned: int) -> dict:
    found = {"engine": "engine", "resident": 10**9, "parts": {"weights": 10**6, "rest": held - 10**6}}
    plan = {"planned_bytes": planned, "planned_peak": 2 * planned}
    return {"processes": processes} | bench_engines.row_of(case, found) | plan


def test_memory_must_be_as_planned_and_fall_where_something_is_cut():
    ddp, fsdp2 = Case(EngineKind.ddp), Case(EngineKind.fsdp2)
    million = 10**6
    rows = judged_memory(
        [
            memory_row(ddp, 1, 500 * million, 500 * million),
            memory_row(ddp, 2, 500 * million, 500 * million),
            memory_row(fsdp2, 1, 500 * million, 500 * million),
            memory_row(fsdp2, 2, 300 * million, 280 * million),
            memory_row(fsdp2, 4, 300 * million, 300 * million),
            memory_row(ddp._replace(shard_teacher=True), 2, 460 * million, 400 * million),
        ]
    )
    assert [row["met"] for row in rows] == [True, True, True, True, False, False]
    assert [row["falls"] for row in rows] == [True, True, True, True, False, True]
    assert rows[-1]["over_plan"] == pytest.approx(1.15)
    page = bench_engines.memory_table(rows).splitlines()
    assert page[2].endswith("| 1 | 499 | **500** | 500 | 1.000 | 1000 | 1000 | met |")
    assert page[6].endswith("| **does not fall** |") and page[7].endswith("| **missed** |")


def test_storages_are_counted_once_and_gradients_are_found():
    weight = nn.Parameter(torch.ones(1000))
    before = engine_cases.storages(engine_cases.live_tensors())
    weight.square().sum().backward()
    view, other = weight.detach()[:10], torch.ones(3, dtype=torch.float64)
    after = engine_cases.storages(engine_cases.live_tensors())
    new = [storage.nbytes() for key, storage in after.items() if key not in before]
    assert sorted(new) == [24, 4000]
    assert engine_cases.storages([weight, view]).keys() == engine_cases.storages([weight]).keys()
    assert len(engine_cases.storages([other, torch.ones(1, device="meta")])) == 1


def memory_of_a_fresh_process() -> dict:
    """Tensors that other tests leave alive would be counted too."""
    program = "import json; from tools.bench.engine_cases import Case, memory_of; "
    program += "print(json.dumps(memory_of(Case(), 'tiny')))"
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": f"{root}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_what_one_process_holds_by_hand_and_as_planned():
    found = memory_of_a_fresh_process()
    size = engine_cases.memory_size("tiny")
    teacher = 4 * count(size.teacher("meta"))
    parts, student = found["parts"], found["parts"]["weights"]
    assert found["engine"] == "engine single, 1 process on cpu"
    assert parts["teacher"] == teacher < student < 1.2 * teacher
    assert parts["EMA"] == student
    assert parts["optimizer state"] == pytest.approx(2 * student, rel=1e-3)  # and counts of steps
    heads = DiscriminatorHeads(128, len(size.taps))
    assert parts["heads"] == pytest.approx(4 * 4 * count(heads), rel=1e-3)  # gradients and two moments too
    assert student < parts["gradients and the rest"] < 1.3 * student
    # of a process of its own it is more than all that is held; here others freed some
    assert found["resident"] > 0
    planned = bench_engines.planned(Case(), "tiny", 1)
    assert sum(parts.values()) == pytest.approx(planned["planned_bytes"], rel=0.05)


def test_the_plan_of_what_stays_leaves_out_what_is_whole_for_a_moment():
    def plan(kind: EngineKind, shard_teacher: bool = False) -> dict[str, int]:
        return bench_engines.planned(Case(kind, shard_teacher=shard_teacher), "tiny", 2)

    ddp, zero2, zero3 = (plan(EngineKind(kind))["planned_bytes"] for kind in ("ddp", "zero2", "zero3"))
    weights = 4 * count(engine_cases.memory_size("tiny").teacher("meta"))
    assert ddp - zero2 == pytest.approx(weights, rel=0.05)  # half of three weights go, half a copy comes
    assert ddp - zero3 + 200e6 == pytest.approx(2 * weights, rel=0.05)  # its bucket stays
    fsdp2, sharded = plan(EngineKind.fsdp2), plan(EngineKind.fsdp2, shard_teacher=True)
    assert fsdp2["planned_bytes"] - sharded["planned_bytes"] == pytest.approx(weights / 2, rel=0.01)
    assert fsdp2["planned_peak"] > fsdp2["planned_bytes"]


def test_rows_hold_one_gradient_from_update_to_update():
    """Found by the tool: gradients of the last update stayed beside the new ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        try:
            mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
            trained = RowSharded(fully_shard(nn.Linear(4, 4), mesh=mesh), Optimizer(), mesh)
            trained.backward(trained(torch.ones(1, 4)).sum())
            trained.update()
            assert all(held.grad is not None for held in trained.parameters.values())
            trained.zero_grad()
            assert all(held.grad is None for held in trained.parameters.values())
            assert all(sharded.grad is None for sharded in trained.sharded.values())
        finally:
            dist.destroy_process_group()


# ---- the command ------------------------------------------------------------------------------------


def test_failed_processes_are_told_with_their_last_words(tmp_path, monkeypatch):
    failed = CompletedProcess([], 1, stderr="first words\nlast words\n")
    monkeypatch.setattr(bench_engines.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(SprintError, match=r"memory on 2 processes ended with 1:\n(.|\n)*last words"):
        bench_engines.in_processes("memory", tmp_path, 2, [Case()], {})


def test_the_exit_status_says_whether_goals_were_missed(monkeypatch, capsys):
    written = {}
    monkeypatch.setattr(bench_engines, "write_results", lambda name, results: written.update({name: results}))
    rows = judged_losses([losses_row(Case()), losses_row(Case(EngineKind.ddp), 2)])
    planted = judged_losses([losses_row(Case()), losses_row(Case(EngineKind.ddp), 2, distill=1.0)])
    table = bench_engines.losses_table
    monkeypatch.setattr(bench_engines, "PARTS", {"losses": (lambda quick, folder: rows, table)})
    assert bench_engines.main([]) == 0
    assert written["engines"]["losses"] == rows and written["engines"]["wanted_difference"] == 1e-5
    written.clear()
    assert bench_engines.main(["--quick"]) == bench_engines.main(["--only", "losses"]) == 0
    assert not written
    monkeypatch.setattr(bench_engines, "PARTS", {"losses": (lambda quick, folder: planted, table)})
    assert bench_engines.main([]) == 1
    assert "missed by ddp on 2" in capsys.readouterr().err
