"""The plan of distribution matching, by hand and against whole updates."""

from dataclasses import replace
from pathlib import Path

import pytest
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
FAKE = "fake score, with optimizer"
ADAMW = Optimizer(OptimizerKind.adamw, betas=(0.9, 0.99))


@pytest.mark.slow
def test_of_the_06b_by_hand():
    on = ["arch=0.6b", "distill.matching.weight=0.01"]
    plain = load_recipe(RECIPES / "0.6b.yaml", ["arch=0.6b"])
    full = load_recipe(RECIPES / "0.6b.yaml", on)
    added = load_recipe(RECIPES / "0.6b.yaml", [*on, "distill.matching.lora_rank=16"])
    networks = build_networks(plain)
    without, with_full, with_added = (distill_memory(each, networks, 8) for each in (plain, full, added))
    assert FAKE not in without
    # a student without log-variance: weights, gradients and momentum in fp32
    fake = 593_502_369 - 1153
    assert with_full[FAKE] == pytest.approx(12 * fake, rel=0.01)
    plan = dry_run(added)
    # eight projections, two pointwise convolutions
    a_block = 8 * (1152 + 1152) + (1152 + 5760) + (2880 + 1152)
    assert plan.parameters["fake score, trained"] == 28 * 16 * a_block
    # CAME's statistics of such thin matrices weigh more
    assert with_added[FAKE] == pytest.approx(12 * 28 * 16 * a_block, rel=0.05)
    assert {*dry_run(full).engines} - {*plan.engines} == {"fsdp2, teacher too"}
    work = work_of(full, networks)
    assert work.rollout == 2.5  # the mean of 1 to 4
    assert (
        plan.flops["stage 2, the fake score's update"] == work.student * 2.5 + work.teacher * 4
    )  # recomputed once
    deeper = load_recipe(RECIPES / "0.6b.yaml", [*on, "distill.depth=40"])
    assert (
        distill_memory(deeper, build_networks(deeper), 8)[FAKE] == with_full[FAKE]
    )  # no deeper than its teacher
    assert "the fake score's update" in "\n".join(page(plan))


@pytest.fixture
def matching_alone(monkeypatch):
    """Sets rank; `build` resets accelerate and sends it to the CPU, and nothing of that outlives the test."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    original = bench_memory.recipe_of

    def set_rank(rank: int) -> None:
        def recipe_of(case):
            recipe = original(case)
            distill = replace(
                recipe.distill,
                matching=Matching(weight=0.01, rollout=2, updates=1, lora_rank=rank, optimizer=ADAMW),
                consistency=replace(recipe.distill.consistency, weight=0.0),
                adversarial=replace(recipe.distill.adversarial, weight=0.0),
            )
            return replace(recipe, distill=distill)

        monkeypatch.setattr(bench_memory, "recipe_of", recipe_of)
        monkeypatch.setattr(bench_memory, "updates_of", lambda case: ("G", "F"))

    yield set_rank
    AcceleratorState._reset_state(reset_partial_state=True)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("precision", "checkpointing", "rank"),
    [
        (Precision.fp32, False, 0),
        pytest.param(Precision.fp32, True, 0, marks=SLOW),
        pytest.param(Precision.bf16, False, 0, marks=SLOW),
        pytest.param(Precision.bf16, True, 0, marks=SLOW),
        pytest.param(Precision.fp32, False, 4, marks=SLOW),
        pytest.param(Precision.fp32, True, 4, marks=SLOW),
        pytest.param(Precision.bf16, False, 4, marks=SLOW),
        (Precision.bf16, True, 4),
    ],
)
def test_the_plan_is_within_a_tenth_of_real_updates(matching_alone, precision, checkpointing, rank):
    matching_alone(rank)
    row = bench_memory.row(
        bench_memory.Case(Request("tiny", 8, "cpu", precision), "distill", checkpointing, 0)
    )
    assert row["planned_bytes"] == pytest.approx(row["peak_bytes"], rel=0.1)
