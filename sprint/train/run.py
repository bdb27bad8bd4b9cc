"""A whole run: teacher in, student out, page written. Every part is skipped if it is already there.

runs/NAME/
    recipe.yaml      as resolved            teacher/       the adapted teacher's folder
    metrics.jsonl    losses and norms       student/       the result's folder
    checkpoints/     one folder per stage   evaluation/    as `sprint evaluate` of this folder writes it
    report.html      that evaluation, curves and costs; samples.png, report.json beside it
    prompts.txt      captions of data other than scenes, which the evaluation draws
    bad_samples.jsonl  what could not be read, if anything
"""

import gc
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import nn

from sprint.base.cpu import keep_freed_memory, return_freed_memory
from sprint.base.door import read_text
from sprint.base.errors import Diverged, SprintError
from sprint.base.files import sweep, write_whole
from sprint.base.names import resolve
from sprint.engine.engine import Engine
from sprint.evaluate.models import OWN_PROMPTS
from sprint.models.depth import depth_words
from sprint.recipe.load import recipe_hash, recipe_text
from sprint.recipe.schema import Recipe
from sprint.recipe.shares import check_shares
from sprint.train.adapt import AdaptStage
from sprint.train.checks import unlearned_guidance
from sprint.train.costs import note_cost
from sprint.train.distill import DistillStage
from sprint.train.folder import claim
from sprint.train.inputs import Inputs
from sprint.train.log import RunLog
from sprint.train.loop import Checkpoints, Interrupted, Rhythm, train
from sprint.train.report.write import model_facts, write_page
from sprint.train.stage import Stage
from sprint.train.start import start_of_adaptation, with_ones
from sprint.train.track import check_tracking
from sprint.weights.checkpoint import understand
from sprint.weights.export import export_student, export_teacher
from sprint.weights.folder import is_export
from sprint.weights.load import load_teacher

log = logging.getLogger(__name__)
LARGE = 10**8  # weights; of a larger network a copy more or less decides whether it fits
FEW_PROMPTS = 16  # of a run that draws nothing by itself, for a `sprint evaluate` later


class Run:
    """A recipe at work in its folder."""

    def __init__(self, recipe: Recipe, root: Path = Path("runs"), engine: Engine | None = None):
        self.recipe = recipe
        self.folder = root / recipe.name
        self.engine = engine or Engine.of(recipe)
        check_shares(recipe, self.engine.processes)
        self.inputs = Inputs(recipe, self.folder, self.engine)
        if self.engine.device.type == "cpu":
            return_freed_memory() if self.inputs.teacher_weights > LARGE else keep_freed_memory()
        if recipe.evaluate.prompts and self.inputs.of_scenes:
            import sprint.lab.reader  # noqa: F401 (scoring wants an extra: say so now, not after training)
        self.engine.broadcast_from_main(self._claim)
        if (told := unlearned_guidance(recipe)) and self.engine.main_process:
            log.warning("%s", told)

    def _claim(self) -> None:
        claim(self.folder, recipe_hash(self.recipe))
        sweep(self.folder)
        write_whole(self.folder / "recipe.yaml", recipe_text(self.recipe))
        note, is_now = self.folder / "data.fingerprint", self.inputs.source.fingerprint or ""
        if note.exists() and _noted(note) != is_now:
            log.warning(
                "%s: not the files that the run began with; its order is another from here on",
                self.recipe.data.path,
            )
        write_whole(note, is_now)
        if not self.inputs.of_scenes:
            self._note_prompts()

    def _note_prompts(self) -> None:
        """What to draw with in the end, of data that cannot be scored; prompts that are there already stay."""
        file = self.folder / OWN_PROMPTS
        if file.exists():
            return
        if captions := self.inputs.source.captions(self.recipe.evaluate.prompts or FEW_PROMPTS):
            write_whole(file, "".join(f"{' '.join(caption.split())}\n" for caption in captions))
        else:
            log.warning("%s: no captions there to draw with; write some into %s", self.recipe.data.path, file)

    def train(self) -> None:
        """Both stages, each exported when it ends; what is there already is kept."""
        if self._exists("student"):
            return
        if self.engine.main_process:
            print(self.engine, file=sys.stderr)
        recipe = self.recipe
        totals = {"adapt": recipe.adapt.steps, "distill": recipe.distill.steps}
        with RunLog(self.folder, totals, main_process=self.engine.main_process, wandb=recipe.wandb) as log:
            if not self._exists("teacher"):
                self.adapt(log)
                _let_go()
            self.distill(log)

    def _exists(self, part: str) -> bool:
        """Whether it is finished. Raises SprintError now, and not after training, where something else is there."""
        return bool(self.engine.broadcast_from_main(lambda: "yes" if is_export(self.folder / part) else None))

    def adapt(self, log: RunLog) -> None:
        checkpoints = self.checkpoints(AdaptStage.name)
        stage = AdaptStage(self.recipe, self.engine, self._adapted(checkpoints.newest), self.inputs.null)
        self.train_stage(stage, log, checkpoints)
        network, facts = stage.result(), model_facts(self.recipe)
        self._finish(
            stage, lambda: export_teacher(self.folder / "teacher", network, self.inputs.family, facts)
        )

    def _adapted(self, newest: Path | None) -> ModelMixin:
        """The network to adapt: at its start, or with weights that the newest checkpoint will take the place of."""
        teacher, time_scale = load_teacher(resolve(self.recipe.teacher))
        if newest:
            return with_ones(teacher, self.recipe.adapt.qk_norm)
        return start_of_adaptation(self.inputs, teacher, time_scale)

    def distill(self, run_log: RunLog) -> None:
        adapted, _ = load_teacher(self.folder / "teacher")
        stage = self.distill_stage(adapted)
        del adapted  # a stage that needs no teacher has let go of it
        self.train_stage(stage, run_log, self.checkpoints(stage.name))
        student, facts = stage.result(), model_facts(self.recipe)
        facts["times"] = self.recipe.distill.student_times
        teachers = understand(self.folder / "teacher").sizes.depth
        facts["depth"] = depth_words(stage.student.view.sizes.depth, teachers)

        def export() -> Path:
            if self.recipe.distill.steps:
                check_moved(student.network, self.folder / "teacher")
            else:
                log.warning("distill.steps = 0: the student is the adapted teacher as it was, untrained")
            return export_student(
                self.folder / "student", student.network, student.logvar, self.inputs.family, facts
            )

        self._finish(stage, export)

    def distill_stage(self, adapted: ModelMixin) -> DistillStage:
        """Stage 2 at its start, for this run's inputs."""
        return DistillStage(self.recipe, self.engine, adapted, self.inputs.null, self.inputs.latent_shape)

    def checkpoints(self, stage: str) -> Checkpoints:
        return Checkpoints.find(self.folder / "checkpoints" / stage, self.engine)

    def train_stage(self, stage: Stage, log: RunLog, checkpoints: Checkpoints) -> None:
        """A stage from where it is to its last step; its checkpoints stay until its result is written."""
        recipe = self.recipe
        rhythm = Rhythm(recipe.save_every, recipe.log_every, recipe.data.workers)
        source, encode = self.inputs.feed(stage.traced)
        source = source.batched(stage.reads)
        seconds = train(stage, source, encode, self.engine, log, checkpoints, rhythm)
        if self.engine.main_process:
            note_cost(self.folder, stage.name, seconds)

    def _finish(self, stage: Stage, export: Callable[[], Path]) -> None:
        """On the main process: write the stage's result; its checkpoints are then of no more use."""

        def work() -> None:
            export()
            shutil.rmtree(self.folder / "checkpoints" / stage.name, ignore_errors=True)  # none after 0 steps

        self.engine.broadcast_from_main(work)
        stage.close()


def check_moved(student: nn.Module, teacher: Path) -> None:
    """Raises Diverged where no weight of the student differs from its teacher's, a folder; reads up to the first."""
    weights = student.state_dict()
    for name, tensor in understand(teacher).stream("diffusers"):
        mine = weights.get(name)
        if mine is not None and not torch.equal(mine.to("cpu", tensor.dtype), tensor):
            return
    raise Diverged(
        "after the last update every weight of the student is still the adapted teacher's, bit for bit, so it never "
        "moved; nothing is exported: raise distill.optimizer.lr, and give the run another name"
    )


def _noted(file: Path) -> str:
    """A note that earlier calls left; one that cannot be read says nothing."""
    try:
        return read_text(file)
    except SprintError:
        return ""


def _let_go() -> None:
    """Modules with hooks are circles that hold each other: collected now, and not when memory is short."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def distill(recipe: Recipe, root: Path = Path("runs"), command: str = "") -> Path | None:
    """Everything that `sprint distill` does.  -> the page; None on processes other than the main one

    Raises SprintError for a recipe that cannot run, `Interrupted` after a signal, once the run is saved.
    """
    if recipe.wandb:
        check_tracking()
    engine = Engine.of(recipe)
    stopped = None
    with engine.watched():
        run = Run(recipe, root, engine)
        try:
            run.train()
        except Interrupted as interrupted:  # a clean end: the others need not miss this process
            stopped = interrupted
    if stopped:
        raise stopped
    if skipped := run.inputs.source.skipped:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        print(f"sprint: passed over {counts}; see {run.inputs.bad_file}", file=sys.stderr)
    if not engine.main_process:
        return None
    return write_page(recipe, run.folder, command, run.inputs.of_scenes)
