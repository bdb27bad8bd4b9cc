"""From a finished run to its page: held-out pictures, scores, costs, curves."""

import dataclasses
import time
from collections.abc import Sequence
from enum import Enum
from operator import attrgetter
from pathlib import Path

import torch

from sprint.base.environment import environment
from sprint.base.place import Place
from sprint.evaluate.choices import FEATURE_CACHE, REAL_FEATURE_CACHE, Options
from sprint.evaluate.metrics.metric import Choices
from sprint.evaluate.metrics.registry import DIVERSITY, FID, PACE, SCENES, TEACHER_FID
from sprint.evaluate.models import EVALUATIONS, OF_A_RUN, STUDENT, TEACHER, own_prompts
from sprint.evaluate.page import column_title
from sprint.evaluate.result import Result
from sprint.evaluate.run import evaluate
from sprint.models.depth import depth_words
from sprint.recipe.load import recipe_text
from sprint.recipe.schema import DataKind, Distill, Recipe
from sprint.train.costs import note_cost, read_costs
from sprint.train.log import METRICS, read_metrics
from sprint.train.report.curves import training_curves, update_times
from sprint.train.report.report import Report, write_report
from sprint.train.report.spread import GENERAL, read_spread, spread_words
from sprint.train.report.verdict import best_student, distillation_goals, fid, in_reading_order, scene_score
from sprint.weights.card import Facts, write_card
from sprint.weights.checkpoint import understand

TITLES = {"adapt": "Stage 1: adapt", "distill": "Stage 2: distill", "evaluate": "Evaluation"}

# keys of `Distill` whose defaults are the paper's
OF_THE_METHOD = (
    "consistency.weight",
    "consistency.time",
    "consistency.normalise_tangent",
    "adversarial.weight",
    "adversarial.time",
    "adversarial.max_time_probability",
    "adversarial.misaligned_pairs",
    "adversarial.loss",
    "adversarial.r1",
    "adversarial.r2",
    "adversarial.warmup_steps",
    "matching.weight",
    "self_consistency",
    "trajectories",
    "regression",
    "guidance_scales",
    "student_times",
)


def evaluate_run(folder: Path, command: str) -> Result:
    """`sprint evaluate FOLDER` of what a run is judged by: in FOLDER/evaluation, by the recipe in FOLDER, drawn by
    this process alone. What is there already is not drawn again."""
    out, device = folder / OF_A_RUN, "cuda" if torch.cuda.is_available() else "cpu"
    choices = Choices(out / FEATURE_CACHE, EVALUATIONS / REAL_FEATURE_CACHE, device=device)
    names = [metric.name for metric in (SCENES, FID, TEACHER_FID, DIVERSITY, PACE)]
    names = [PACE.name] if own_prompts(str(folder)) else names
    result = evaluate(Options(str(folder), out, choices, metrics=names, command=command), place=Place())
    assert result  # the only process writes
    return result


def model_facts(recipe: Recipe, result: Result | None = None) -> Facts:
    """What the model cards say of this run."""
    facts = Facts(recipe=recipe.name, teacher=recipe.teacher, data=_what_was_learned(recipe))
    if result:
        columns = in_reading_order(result).columns
        facts["scores"] = {
            ", ".join(column_title(c)): {"scene score": scene_score(c), "FID": fid(c)}
            for c in columns
            if c.hash and None not in (scene_score(c), fid(c))
        }
        facts["spread"] = of_other_runs(recipe, result)
    return facts


def _what_was_learned(recipe: Recipe) -> str:
    data, traced = recipe.data, recipe.distill.trajectories.states > 0
    if data.kind is DataKind.scenes:
        data_of_run = "captions of built-in scenes" if traced else "built-in scenes"
    else:
        there = {DataKind.prompts: "prompts", DataKind.cache: "samples"}.get(data.kind, "pictures")
        data_of_run = f"the {'captions' if traced else there} in {data.path}"
    return f"{data_of_run}, and the teacher's trajectories for them" if traced else data_of_run


def of_other_runs(recipe: Recipe, result: Result) -> str:
    """What another run of the recipe would change of its best column, in words."""
    best = best_student(result)
    return spread_words(recipe, best.role, best.steps, read_spread()) if best else GENERAL


def write_page(recipe: Recipe, folder: Path, command: str, of_scenes: bool = True) -> Path:
    """Evaluate what is not yet evaluated and write the report.  -> report.html

    of_scenes   whether the built-in scenes were learned; of other data the run's own captions are drawn, if any
    """
    result = None
    if recipe.evaluate.prompts and (of_scenes or own_prompts(str(folder))):
        began = time.monotonic()
        result = evaluate_run(folder, command)
        if "evaluate" not in read_costs(folder).seconds:
            note_cost(folder, "evaluate", time.monotonic() - began)
        facts = model_facts(recipe, result)
        facts["depth"] = depths(recipe, folder)
        write_card(folder / "student", facts)
    costs, rows = read_costs(folder), read_metrics(folder / METRICS)
    report = Report(
        name=recipe.name,
        result=result,
        goals=distillation_goals(result) if result else (),
        curves=training_curves(rows),
        update_times=update_times(rows),
        seconds={TITLES[part]: seconds for part, seconds in costs.seconds.items() if part in TITLES},
        peak_memory=costs.peak_memory,
        recipe=recipe_text(recipe),
        command=command,
        environment=environment(),
        spread=of_other_runs(recipe, result) if result else GENERAL,
        notes=list(filter(None, [beside_the_paper(recipe.distill), whose_speed(recipe, folder)])),
    )
    return write_report(folder, report)


def depths(recipe: Recipe, folder: Path) -> str:
    """ "8 blocks, its teacher 4", of a run's two folders; "" where nothing was asked for."""
    if not recipe.distill.depth:
        return ""
    own, teachers = (understand(folder / role).sizes.depth for role in (STUDENT, TEACHER))
    return depth_words(own, teachers)


def whose_speed(recipe: Recipe, folder: Path) -> str:
    """For the page: at which depth the student's seconds were taken; "" where it is the teacher's."""
    if told := depths(recipe, folder):
        speed = "its seconds a picture, at any number of steps, are of all its blocks"
        return f"The student has {told} (the paper: as many): {speed}."
    return ""


def beside_the_paper(distill: Distill) -> str:
    """Which settings of the method are not the paper's, in a sentence; "" where all are."""
    plain, parts = Distill(), []
    for key in OF_THE_METHOD:
        ours, theirs = attrgetter(key)(distill), attrgetter(key)(plain)
        if ours != theirs:
            parts.append(f"{key} {_shown(ours)} (the paper: {_shown(theirs)})")
    return f"Not as in the paper: {'; '.join(parts)}." if parts else ""


def _shown(value: object) -> str:
    if dataclasses.is_dataclass(value):
        return " ".join(f"{name} {each}" for name, each in dataclasses.asdict(value).items())
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_shown, value))}]" if value else "none"
    return f"{value:g}" if isinstance(value, float) else f"{value}"
