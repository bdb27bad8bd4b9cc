"""The plan of a run that learns from whole trajectories: what it holds and computes, and what it spares."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from sprint.data.batch import Traced, Trajectory
from sprint.engine.engine import Engine
from sprint.maths.schedule import teacher_times
from sprint.models.sana.family import Sana
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import DataKind, Precision, Recipe, Trajectories
from sprint.train.distill import DistillStage
from sprint.train.plan.networks import Networks, networks_of
from sprint.train.plan.page import page
from sprint.train.plan.plan import distill_memory, dry_run, totals_of
from sprint.train.plan.work import drawn, flops_of, work_of
from tools.bench import memory as bench_memory
from tools.bench.flops import Counts
from tools.bench.measure import SIZES, Request

RECIPES = Path(__file__).parents[3] / "recipes"
BATCH, STATES, STEPS = 8, 2, 4
SIZE = SIZES["tiny"]
TERMS = {"sCM": (1.0, 0.0), "regression": (0.0, 1.0), "both": (1.0, 1.0)}


def recipe_of(terms: str, precision: Precision = Precision.fp32, checkpointing: bool = False) -> Recipe:
    case = bench_memory.Case(Request("tiny", BATCH, "cpu", precision), "distill", checkpointing)
    recipe = bench_memory.recipe_of(case)
    recipe.distill.consistency.weight, recipe.distill.regression = TERMS[terms]
    recipe.distill.adversarial.weight = 0.0
    recipe.distill.trajectories = Trajectories(STATES, STEPS)
    recipe.data.kind = DataKind.cache  # nothing is drawn in the update
    return recipe


def networks() -> Networks:
    return networks_of(
        Sana(), SIZE.config | {"qk_norm": None}, len(SIZE.taps), SIZE.config["sample_size"] ** 2
    )


@pytest.fixture
def stage_of(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def make(recipe: Recipe) -> DistillStage:
        AcceleratorState._reset_state(reset_partial_state=True)
        engine = Engine(recipe.precision)
        return DistillStage(recipe, engine, SIZE.teacher(engine.device), SIZE.text(1), SIZE.latent)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def traced() -> Traced:
    count = BATCH // STATES
    states, velocity = torch.randn(2, count, STEPS, *SIZE.latent)
    t = torch.tensor(teacher_times(STEPS)[:-1]).repeat(count, 1)
    return Traced(*SIZE.batch_of(count), Trajectory(states, velocity, t, torch.full((count,), 4.5)))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.slow
def test_the_plan_is_within_a_tenth_of_real_updates(stage_of, terms, precision, checkpointing):
    recipe = recipe_of(terms, precision, checkpointing)
    plan = totals_of(distill_memory(recipe, networks(), gpus=1))
    with bench_memory.LiveBytes() as live:
        stage, batch = stage_of(recipe), traced()
        for step in range(2):
            live.restart()
            live.peak = live.now
            stage.update(step, batch)
    assert plan[checkpointing] == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("terms", TERMS)
def test_the_work_is_what_a_whole_update_computes(stage_of, terms):
    """But for what is read of a text, which the plan counts with a tangent too, and the smallest layers."""
    recipe = recipe_of(terms)
    recipe.adapt.steps, recipe.distill.steps = 0, 1
    stage, counter = stage_of(recipe), Counts()
    stage.update(0, traced())
    with counter:
        stage.update(1, traced())
    counted = sum(each.flops for part in counter.operations.values() for each in part) / BATCH
    found = flops_of(recipe, networks())
    assert 0.99 < found["stage 2, the student's update"] / counted < 1.05
    assert found["run"] == BATCH * found["stage 2, the student's update"]


def test_evaluations_of_the_teacher_for_a_sample():
    recipe = recipe_of("sCM")
    assert drawn(recipe) == (0, 0)
    recipe.data.kind = DataKind.scenes
    assert drawn(recipe) == (0, 2 * STEPS / STATES)
    recipe.data.kind, recipe.data.teacher_steps = DataKind.prompts, 10
    assert drawn(recipe) == (20, 2 * STEPS / STATES)
    recipe.distill.trajectories.states = 0
    assert drawn(recipe) == (20, 20)
    recipe.data.kind = DataKind.folder
    assert drawn(recipe) == (0, 0)


def test_who_draws_is_held_and_counted():
    recipe = recipe_of("sCM")
    cached, made = distill_memory(recipe, networks(), 1), networks()
    assert "frozen teacher" not in cached and "teacher that draws" not in cached
    recipe.data.kind = DataKind.prompts
    drawing = distill_memory(recipe, made, 1)
    assert drawing["teacher that draws"] == 4 * sum(p.numel() for p in made.teacher.parameters())
    recipe.adapt.steps = 0
    work = work_of(recipe, made)
    assert flops_of(recipe, made)["stage 2, 4 evaluations to draw"] == 4 * work.teacher
    recipe.distill.consistency.weight, recipe.distill.trajectories.states = 1.0, 0
    assert "frozen teacher" in distill_memory(recipe, made, 1)


@pytest.mark.slow
def test_the_recipe_of_prompts_alone_is_planned_as_its_page_says():
    recipe = load_recipe(RECIPES / "0.6b-prompts.yaml")
    plan = dry_run(recipe)
    said = "\n".join(page(plan))
    assert "stage 2, 2.13333 evaluations to draw" in said and len(plan.parameters) == 3
    assert not {"frozen teacher", "heads, with optimizer"} & plan.stages[0].memory[8].keys()
    of_eight = totals_of(plan.stages[0].memory[8]).recomputed / 2**30
    hours = plan.flops["run"] / 1e14 / 3600
    page_of_recipes = (RECIPES / "README.md").read_text()
    assert (
        f"{of_eight:.1f} GiB on each of 8 GPUs" in page_of_recipes
        and f"{hours:.0f} GPU hours" in page_of_recipes
    )
