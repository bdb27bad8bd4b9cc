"""One job of the ablations in a process of its own: train, draw, score, and write result.json last."""

import io
import json
import math
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.utils import logging
from safetensors.torch import load, save

from sprint.base.errors import Diverged, SprintError
from sprint.base.files import write_whole
from sprint.base.names import resolve
from sprint.data.batch import Batch
from sprint.evaluate.metrics.gaussian import GaussianStatistics, fid, resampled_fid
from sprint.evaluate.metrics.real_scenes import REFERENCE_SCENES
from sprint.evaluate.metrics.real_scenes import real_statistics as statistics_of
from sprint.evaluate.result import share
from sprint.evaluate.store import in_batches
from sprint.lab.features import scene_features
from sprint.lab.reader import RULES, score
from sprint.lab.series import REFERENCE_SEED, SHOWN, held_out_scenes
from sprint.models.teacher import SPARSE_TIME
from sprint.models.view import TrigFlowView
from sprint.recipe.schema import Evaluate
from sprint.sample.generate import Generator, StudentGenerator
from sprint.sample.load import load_generator
from sprint.train.adapt import AdaptStage
from sprint.train.distill import GENERATOR, DistillStage
from sprint.train.log import METRICS, RunLog, read_metrics
from sprint.train.loop import Interrupted
from sprint.train.report.write import model_facts
from sprint.train.run import Run
from sprint.train.start import start_of_adaptation
from sprint.train.update import Means
from sprint.weights.export import export_student
from sprint.weights.folder import is_export
from sprint.weights.load import load_teacher
from tools.ablations.jobs import (
    INTERRUPTED,
    RESULT,
    Job,
    feature_network,
    is_done,
    other_settings,
)
from tools.ablations.seconds import thread_seconds
from tools.bench.measure import environment

PICTURES = "pictures.npz"  # arrays named by steps, uint8 [SHOWN, 64, 64, 3]
RESAMPLES = 100  # bootstrap sets of pictures behind the error of FID
MEDIAN_ERROR = math.sqrt(math.pi / 2)  # standard error of a normal sample's median over that of its mean
TEACHER_FOLDER, STUDENT_FOLDER = "teacher", "student"


def work(job: Job, root: Path) -> int:
    """-> exit code. Training that diverges is a result: its line is kept, and what it logged.

    Raises SprintError for any other trouble: nothing is recorded then, and the next start tries again.
    """
    if is_done(job, root):
        return 0
    if changed := other_settings(job, root / job.key):
        raise SprintError(
            f"{root / job.key}: made with other settings ({', '.join(changed)}); delete it to make it anew"
        )
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    try:
        generator, failed = _train(job, root)
    except Interrupted as stopped:
        print(stopped)
        return INTERRUPTED
    folder, began = root / job.key, time.monotonic()
    scores = score_steps(generator, job, folder, root) if generator else {}
    rows = read_metrics(folder / METRICS)
    seconds = (rows[-1]["seconds"] if rows else 0.0) + time.monotonic() - began
    result = {
        "key": job.key,
        "kind": job.kind,
        "seed": job.recipe.seed,
        "failed": failed,
        "scores": scores,
        "points": score_points(job, rows, root) if generator else [],
        "training": training_cost(job, rows, root),
        "norms": norms(rows),
        "seconds": round(seconds, 1),  # of training and scoring, breaks left out
        "network": feature_network(),
        "reader": RULES,
        "made_by": made_by(),
    }
    write_whole(folder / RESULT, json.dumps(result, indent=1) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return 0


def made_by() -> dict:
    """What figures depend on beside the recipe: device, versions and commit."""
    here = environment()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else here["cpu"]
    return {"device": device, "versions": here["versions"], "commit": here["commit"]}


# ---- training ---------------------------------------------------------------------------------------


def _train(job: Job, root: Path) -> tuple[Generator | None, str | None]:
    """-> what draws with the result, or the line with which training diverged"""
    if job.teacher:
        failed = json.loads((root / job.teacher / RESULT).read_text(encoding="utf-8"))["failed"]
        if failed:
            return None, f"stage 1: {failed}"
        _copy_whole(root / job.teacher / TEACHER_FOLDER, root / job.key / TEACHER_FOLDER)
    run = PointedRun(job, root)
    train = {"teacher": _teacher, "student": _student, "sparse": _sparse}[job.kind]
    try:
        return train(run), None
    except Diverged as error:
        return None, str(error)


class PointedRun(Run):
    """A run that keeps its student as it is after some steps of stage 2 too, each as a folder of its own."""

    def __init__(self, job: Job, root: Path):
        super().__init__(job.recipe, root)
        self.points = job.points

    def distill_stage(self, adapted: ModelMixin) -> DistillStage:
        stage = super().distill_stage(adapted)
        update = stage.update

        def kept(step: int, batch: Batch) -> Means:
            means = update(step, batch)
            if step + 1 in self.points:
                self._keep(stage, step + 1)
            return means

        stage.update = kept
        return stage

    def _keep(self, stage: DistillStage, step: int) -> None:
        folder = point_folder(self.folder, step)
        if is_export(folder):
            return
        student, facts = stage.result(), model_facts(self.recipe)
        facts["times"] = self.recipe.distill.student_times
        export_student(folder, student.network, student.logvar, self.inputs.family, facts)


def point_folder(folder: Path, step: int) -> Path:
    """Of a run, the student that it had after so many steps."""
    return folder / "points" / f"{step:06d}"


def _teacher(run: Run) -> Generator:
    if not (run.folder / TEACHER_FOLDER).exists():
        with RunLog(run.folder, {AdaptStage.name: run.recipe.adapt.steps}) as log:
            run.adapt(log)
    return load_generator(str(run.folder / TEACHER_FOLDER), run.engine.device)


def _student(run: Run) -> Generator:
    run.train()
    return load_generator(str(run.folder / STUDENT_FOLDER), run.engine.device)


def _sparse(run: Run) -> Generator:
    """Both stages in the teacher's own time. No folder that diffusers opens can hold the student, so what a start
    after a break goes on from is checkpoints alone."""
    recipe = run.recipe
    with RunLog(run.folder, {"adapt": recipe.adapt.steps, "distill": recipe.distill.steps}) as log:
        network, time_scale = load_teacher(resolve(recipe.teacher))
        if time_scale != SPARSE_TIME:
            raise SprintError(
                f"{recipe.teacher}: its time is dense already; the sparse row needs another teacher"
            )
        network = start_of_adaptation(run.inputs, network, time_scale, own_time_scale=time_scale)
        adapt = AdaptStage(recipe, run.engine, network, run.inputs.null, time_scale)
        run.train_stage(adapt, log, run.checkpoints(adapt.name))
        distill = DistillStage(
            recipe, run.engine, adapt.result(), run.inputs.null, run.inputs.latent_shape, time_scale
        )
        run.train_stage(distill, log, run.checkpoints(distill.name))
    view = TrigFlowView(distill.result().network, time_scale).requires_grad_(False)
    return StudentGenerator(
        view.to(run.engine.device), run.inputs.family.to(run.engine.device), recipe.data.size
    )


def _copy_whole(source: Path, target: Path) -> None:
    """A folder that is there whole or not at all."""
    if target.exists():
        return
    scrap = target.with_name(f".{target.name}.part")
    shutil.rmtree(scrap, ignore_errors=True)
    shutil.copytree(source, scrap)
    scrap.rename(target)


# ---- scores -----------------------------------------------------------------------------------------


def score_steps(generator: Generator, job: Job, folder: Path, root: Path) -> dict[str, dict]:
    """By number of steps: scene score and FID, each with its error. The first pictures are kept."""
    settings = job.recipe.evaluate
    scores, kept = {}, {}
    for count in (settings.teacher_steps,) if job.kind == "teacher" else settings.steps:
        scores[str(count)], pictures = score_of(generator, settings, count, root)
        kept[str(count)] = pictures[:SHOWN]
    packed = io.BytesIO()
    np.savez_compressed(packed, **kept)
    write_whole(folder / PICTURES, packed.getvalue())
    return scores


def score_of(
    generator: Generator, settings: Evaluate, count: int, root: Path
) -> tuple[dict[str, float | dict], np.ndarray]:
    """What pictures in `count` steps are worth, and the pictures: uint8 [settings.prompts, H, W, 3]."""
    real, network = real_statistics(root), scene_features()
    scenes = held_out_scenes(settings.prompts)
    captions, seeds = [scene.caption for scene in scenes], range(len(scenes))
    times, batch_size, guidance = generator.times(count), settings.batch_size, settings.guidance_scale
    pictures = np.concatenate(list(in_batches(generator, captions, seeds, batch_size, times, guidance)))
    features = network(pictures)
    found = score(pictures, [scene.claim for scene in scenes])
    return {
        "score": found["mean_over_samples"],
        "score_error": _binomial(found["mean_over_samples"], found["n"]),
        "fid": fid(GaussianStatistics.of(features), real),
        "fid_error": statistics.stdev(resampled_fid(features, real, RESAMPLES)),
        "categories": {
            name: row | {"error": _binomial(row["share"], row["n"])}
            for name, row in found["categories"].items()
        },
    }, pictures


def score_points(job: Job, rows: list[dict], root: Path) -> list[dict]:
    """The run's earlier students at 1 step, and what training had cost by then, stage 1 among it."""
    found = []
    for step in job.points:
        generator = load_generator(str(point_folder(root / job.key, step)))
        scores, _ = score_of(generator, job.recipe.evaluate, 1, root)
        cost = training_cost(job, rows, root, step)["thread_seconds"]
        found.append({"step": step, "thread_seconds": cost} | scores)
    return found


def training_cost(job: Job, rows: list[dict], root: Path, last: int | None = None) -> dict[str, float]:
    """Seconds of a thread, those of stage 1 among them, to step `last` of stage 2; and what is left out of them."""
    costs = [thread_seconds(rows, AdaptStage.name), thread_seconds(rows, DistillStage.name, last)]
    if job.teacher:
        costs.append(thread_seconds(read_metrics(root / job.teacher / METRICS), AdaptStage.name))
    counted, left_out = (sum(parts) for parts in zip(*costs, strict=True))
    return {"thread_seconds": round(counted, 1), "left_out": round(left_out, 1)}


def _binomial(p: float, count: int) -> float:
    return share(round(p * count), count).error


def real_statistics(root: Path) -> GaussianStatistics:
    """Of the real scenes in the scene network's features; computed once and kept."""
    network = scene_features()
    series = f"{network.name.split()[-1]}-{REFERENCE_SEED}-{REFERENCE_SCENES}"
    file = root / f"real-{series}.safetensors"
    if not file.exists():
        found = statistics_of(network, REFERENCE_SCENES)
        write_whole(file, save({name: tensor.contiguous() for name, tensor in found.tensors().items()}))
    return GaussianStatistics.of_tensors(load(file.read_bytes()))


def norms(rows: list[dict]) -> dict[str, float | None]:
    """Medians and highest values of what stage 2 logged of the student's updates; None where nothing was finite.

    …_decades is the standard error of the median's logarithm to base 10, as if updates were independent.
    """
    student = [row for row in rows if row["stage"] == DistillStage.name and row["phase"] == GENERATOR]
    found: dict[str, float | None] = {}
    for name in ("grad_norm", "tangent_norm"):
        values = [row[name] for row in student if row.get(name) is not None and math.isfinite(row[name])]
        found[name] = statistics.median(values) if values else None
        found[f"{name}_highest"] = max(values, default=None)
        logs = [math.log10(value) for value in values if value > 0]
        spread = statistics.stdev(logs) if len(logs) > 1 else 0.0
        found[f"{name}_decades"] = MEDIAN_ERROR * spread / math.sqrt(max(len(logs), 1))
    found["skipped"] = max((row.get("skipped") or 0 for row in student), default=0)
    return found


if __name__ == "__main__":
    sys.exit("ablation_run: started by ablations.py")
