"""A whole run: teacher in, student out, page written. Every part is skipped if it is already there.

runs/NAME/
    recipe.yaml      as resolved            teacher/       the adapted teacher, a SanaPipeline folder
    metrics.jsonl    losses and norms       student/       the result, a SanaSprintPipeline folder
    checkpoints/     one folder per stage   report.html    the page; samples.png, report.json beside it
"""

import contextlib
import shutil
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor

from sprint import checkpoint
from sprint.convert.load import load_teacher, understand_teacher
from sprint.cpu import keep_freed_memory
from sprint.data.batch import Batch, Sample
from sprint.data.source import Source, encode, open_source
from sprint.engine import Engine, to_device
from sprint.export import export_student, export_teacher
from sprint.files import write_whole
from sprint.log import RunLog
from sprint.models.adapted import calibrated, with_ones
from sprint.models.family import TEXT_UNIT, Family, encode_null, load_family, resolve
from sprint.plan import check_arch, check_taps
from sprint.recipe import AdaptStart, Precision, Recipe, recipe_hash, recipe_text
from sprint.train.adapt import AdaptStage, draw, noised
from sprint.train.distill import DistillStage
from sprint.train.loop import Stage, train
from sprint.train.page import model_facts, note_cost, write_page

CALIBRATION_BATCHES, CALIBRATION_SIZE = 4, 32


class Run:
    """A recipe at work in its folder."""

    def __init__(self, recipe: Recipe, root: Path = Path("runs")):
        self.recipe = recipe
        self.folder = root / recipe.name
        self.engine = Engine(recipe.precision)
        if self.engine.device.type == "cpu":
            keep_freed_memory()
        self._open_inputs()
        if self.engine.main_process:
            checkpoint.claim(self.folder, recipe_hash(recipe))
            write_whole(self.folder / "recipe.yaml", recipe_text(recipe))
        self.engine.wait()

    def _open_inputs(self) -> None:
        """Data, teacher, text side and autoencoder: what is wrong with them shows before the folder is touched."""
        recipe = self.recipe
        if recipe.evaluate.prompts:
            import sprint.evaluate.columns  # noqa: F401 (scoring wants an extra: say so now, not after training)
        self.source: Source = open_source(recipe.data)
        if not (self.folder / "teacher").exists():
            config = understand_teacher(resolve(recipe.teacher)).config
            check_arch(recipe, config)
            check_taps(recipe, config["num_layers"])
        family = recipe.teacher_family or recipe.teacher
        dtype = torch.bfloat16 if recipe.precision is Precision.bf16 else torch.float32
        self.family: Family = load_family(family, recipe.text.max_length, recipe.text.instruction, dtype)
        self.family.to(self.engine.device)
        self.null: tuple[Tensor, Tensor] = encode_null(self.family)
        first = encode(self.source.samples(range(1)), self.family)
        self.latent_shape: tuple[int, int, int] = tuple(first.latent.shape[1:])

    def train(self) -> None:
        """Both stages, each exported when it ends."""
        recipe = self.recipe
        totals = {"adapt": recipe.adapt.steps, "distill": recipe.distill.steps}
        with RunLog(self.folder, totals, main_process=self.engine.main_process, wandb=recipe.wandb) as log:
            if not (self.folder / "teacher").exists():
                self._adapt(log)
            if not (self.folder / "student").exists():
                self._distill(log)

    def _adapt(self, log: RunLog) -> None:
        teacher, time_scale = load_teacher(resolve(self.recipe.teacher))
        network = self.start_of_adaptation(teacher, time_scale)
        stage = AdaptStage(self.recipe, self.engine, network, self.null)
        self._train(stage, log)
        if self.engine.main_process:
            export_teacher(self.folder / "teacher", stage.network, self.family, model_facts(self.recipe))
        self._leave("adapt")

    def start_of_adaptation(
        self, teacher: SanaTransformer2DModel, time_scale: float
    ) -> SanaTransformer2DModel:
        """The adapted network before its first step, calibrated on the run's own data or at ones."""
        if self.recipe.adapt.start is AdaptStart.ones:
            return with_ones(teacher)
        teacher.to(self.engine.device)
        batches = []
        for i in range(CALIBRATION_BATCHES):
            positions = range(i * CALIBRATION_SIZE, (i + 1) * CALIBRATION_SIZE)
            batch = self.encode(self.source.samples(positions))
            draws = draw(
                self.recipe.seed,
                -1 - i,
                CALIBRATION_SIZE,
                batch.latent.shape[1:],
                self.recipe.adapt.shift,
                0.0,
            )
            draws = to_device(draws, self.engine.device)
            batches.append((noised(batch.latent, draws), draws.t_fm, batch))
        return calibrated(teacher, batches, time_scale)

    def _distill(self, log: RunLog) -> None:
        adapted, _ = load_teacher(self.folder / "teacher")
        stage = DistillStage(self.recipe, self.engine, adapted, self.null, self.latent_shape)
        self._train(stage, log)
        if self.engine.main_process:
            with stage.ema.applied(stage.student) if stage.ema else contextlib.nullcontext():
                student = stage.student
                export_student(
                    self.folder / "student",
                    student.network,
                    student.logvar,
                    self.family,
                    model_facts(self.recipe),
                )
        self._leave("distill")

    def encode(self, samples: list[Sample]) -> Batch:
        """A batch for either stage; compiled graphs are made anew for each length of text, so they get one."""
        unit = self.recipe.text.max_length if self.recipe.compile else TEXT_UNIT
        return encode(samples, self.family, self.recipe.micro_batch_size, unit)

    def _train(self, stage: Stage, log: RunLog) -> None:
        recipe = self.recipe
        folder = self.folder / "checkpoints" / stage.name
        seconds = train(
            stage, self.source, self.encode, self.engine, log, folder, recipe.save_every, recipe.log_every
        )
        if self.engine.main_process:
            note_cost(self.folder, stage.name, seconds)

    def _leave(self, stage: str) -> None:
        """The stage's result is exported: its checkpoints are of no more use."""
        if self.engine.main_process:
            shutil.rmtree(self.folder / "checkpoints" / stage, ignore_errors=True)  # none after 0 steps
        self.engine.wait()


def distill(recipe: Recipe, root: Path = Path("runs"), command: str = "") -> Path | None:
    """Everything that `sprint distill` does.  -> the page; None on processes other than the main one

    Raises SprintError for a recipe that cannot run, `Interrupted` after a signal, once the run is saved.
    """
    run = Run(recipe, root)
    run.train()
    if not run.engine.main_process:
        return None
    return write_page(recipe, run.folder, command)
