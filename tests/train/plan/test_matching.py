"""The plan of distribution matching, by hand and against whole updates."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Matching, Optimizer, OptimizerKind, Precision
from sprint.train.plan.networks import build_networks
from sprint.train.plan.page import page
from sprint.train.plan.plan import distill_memory, dry_run
from sprint.train.plan.work import work_of
from tools.bench import memory as bench_memory
from tools.bench.measure import Request

RECIPES = Path(__file__).parents[3] / "recipes"
ON = ("distill.matching.weight=0.01", "arch=0.6b")
FAKE = "fake score, with optimizer"
ADAMW = Optimizer(OptimizerKind.adamw, betas=(0.9, 0.99))


@pytest.fixture
def on_cpu(monkeypatch):
    """`build` resets accelerate and sends it to the CPU; nothing of that outlives the test."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_of_the_06b_by_hand():
    plain = load_recipe(RECIPES / "0.6b.yaml", ["arch=0.6b"])
    full = load_recipe(RECIPES / "0.6b.yaml", [*ON])
    added = load_recipe(RECIPES / "0.6b.yaml", [*ON, "distill.matching.lora_rank=16"])
    networks = build_networks(plain)
    student = 593_502_369 - 1153  # it has no log-variance
    parts = {recipe: distill_memory(recipe, networks, 8) for recipe in ()}
    with_full, with_added, without = (distill_memory(recipe, networks, 8) for recipe in (full, added, plain))
    assert FAKE not in without and not parts
    # weights, gradients and CAME's momentum in fp32, copies in bf16
    assert with_full[FAKE] == pytest.approx(14 * student, rel=0.01)
    linear = 28 * 16 * (8 * (1152 + 1152) + (1152 + 5760) + (2880 + 1152))
    assert dry_run(added).parameters["fake score, trained"] == linear
    assert with_added[FAKE] == pytest.approx(14 * linear, rel=0.1)  # of thin matrices CAME's statistics weigh more
    work = work_of(full, networks)
    assert work.rollout == 2.5
    assert dry_run(full).flops["stage 2, the fake score's update"] == work.forward * (2.5 + 4)  # recomputed
    assert "the fake score's update" in "\n".join(page(dry_run(full)))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", Precision)
def test_the_plan_is_within_a_tenth_of_real_updates(on_cpu, monkeypatch, precision, checkpointing, rank):
    original = bench_memory.recipe_of

    def with_matching(case):
        recipe = original(case)
        matching = Matching(weight=0.01, rollout=2, updates=1, lora_rank=rank, optimizer=ADAMW)
        return replace(recipe, distill=replace(recipe.distill, matching=matching))

    monkeypatch.setattr(bench_memory, "recipe_of", with_matching)
    monkeypatch.setattr(bench_memory, "updates_of", lambda case: ("G", "D", "F"))
    case = bench_memory.Case(Request("tiny", 8, "cpu", precision), "distill", checkpointing, 0)
    row = bench_memory.row(case)
    torch.clear_autocast_cache()
    assert row["planned_bytes"] == pytest.approx(row["peak_bytes"], rel=0.1)
