"""From a finished run to its page: held-out pictures, scores, costs, curves."""

import dataclasses
import time
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import torch

from sprint.base.environment import environment
from sprint.lab.series import SHOWN, held_out_scenes
from sprint.recipe.load import recipe_text
from sprint.recipe.schema import DataKind, Distill, Recipe
from sprint.sample.load import load_generator
from sprint.train.costs import note_cost, read_costs
from sprint.train.log import METRICS, read_metrics
from sprint.train.report.curves import training_curves, update_times
from sprint.train.report.report import (
    Column,
    Report,
    Role,
    distillation_goals,
    write_report,
)
from sprint.weights.card import Facts, write_card

TITLES = {"adapt": "Stage 1: adapt", "distill": "Stage 2: sCM + LADD", "evaluate": "Evaluation"}

# keys of `Distill` whose defaults are the paper's
OF_THE_METHOD = (
    "consistency.weight",
    "consistency.time",
    "consistency.normalise_tangent",
    "adversarial.weight",
    "adversarial.time",
    "adversarial.max_time_probability",
    "adversarial.misaligned_pairs",
    "self_consistency",
    "guidance_scales",
    "student_times",
)


def evaluate_run(recipe: Recipe, folder: Path) -> tuple[list[Column], float]:
    """Every column, kept in folder/evaluation and drawn anew only for another model, other times or another
    feature network.  -> columns, FID of real against real"""
    from sprint.evaluate.metrics.real_scenes import real_floor, real_statistics
    from sprint.evaluate.run import model_hash
    from sprint.lab.features import scene_features
    from sprint.train.report.columns import Origin, evaluate_column, load_column, save_column

    settings, kept = recipe.evaluate, folder / "evaluation"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_generator(str(folder / "teacher"), device)
    student = load_generator(str(folder / "student"), device)
    scenes = held_out_scenes(settings.prompts)
    network = scene_features(device)
    real = real_statistics(network)
    hashes = {
        generator: model_hash(str(folder / name))
        for generator, name in ((teacher, "teacher"), (student, "student"))
    }
    wanted = [(teacher, Role.teacher, settings.teacher_steps), (teacher, Role.undistilled, 1)]
    wanted += [(student, Role.student, steps) for steps in settings.steps]
    columns = []
    for generator, role, steps in wanted:
        origin = Origin(hashes[generator], tuple(generator.times(steps)), network.name)
        column = load_column(role, steps, kept, origin)
        if column is None:
            column = evaluate_column(
                generator, role, steps, scenes, network, real, settings.guidance_scale, settings.batch_size
            )
            save_column(column, kept, origin)
        columns.append(column)
    return columns, real_floor(network, real, settings.prompts)


def model_facts(recipe: Recipe, columns: Sequence[Column] = ()) -> Facts:
    """What the model cards say of this run."""
    data = "built-in scenes" if recipe.data.kind is DataKind.scenes else f"the pictures in {recipe.data.path}"
    facts = Facts(recipe=recipe.name, teacher=recipe.teacher, data=data)
    if columns:
        facts["scores"] = {
            ", ".join(c.titles): {"scene score": c.scores.overall, "FID": c.fid} for c in columns
        }
    return facts


def write_page(recipe: Recipe, folder: Path, command: str) -> Path:
    """Evaluate what is not yet evaluated and write the report.  -> report.html"""
    columns, notes = [], list(filter(None, [beside_the_paper(recipe.distill)]))
    if recipe.evaluate.prompts:
        began = time.monotonic()
        columns, floor = evaluate_run(recipe, folder)
        notes += [
            f"As many other real scenes have an FID of {floor:.3f} in this space.",
            "Seconds per picture: text encoder, network and autoencoder, "
            f"in batches of {recipe.evaluate.batch_size}.",
        ]
        if "evaluate" not in read_costs(folder)["seconds"]:
            note_cost(folder, "evaluate", time.monotonic() - began)
        write_card(folder / "student", model_facts(recipe, columns))
    costs, rows = read_costs(folder), read_metrics(folder / METRICS)
    report = Report(
        name=recipe.name,
        columns=columns,
        captions=[s.caption for s in held_out_scenes(min(SHOWN, recipe.evaluate.prompts))],
        prompts=recipe.evaluate.prompts or None,
        fid_space="the scene network's features",
        curves=training_curves(rows),
        update_times=update_times(rows),
        seconds={TITLES[part]: seconds for part, seconds in costs["seconds"].items()},
        peak_memory=costs["peak_memory"],
        recipe=recipe_text(recipe),
        command=command,
        environment=environment(),
        notes=notes,
    )
    report = dataclasses.replace(report, goals=distillation_goals(report))
    return write_report(folder, report)


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
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_shown, value))}]" if value else "none"
    return f"{value:g}" if isinstance(value, float) else f"{value}"
