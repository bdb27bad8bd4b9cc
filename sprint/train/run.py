"""A whole run: teacher in, student out, page written. Every part is skipped if it is already there.

runs/NAME/
    recipe.yaml      as resolved            teacher/       the adapted teacher's folder
    metrics.jsonl    losses and norms       student/       the result's folder
    checkpoints/     one folder per stage   report.html    the page; samples.png, report.json beside it
    bad_samples.jsonl  what could not be read, if anything
"""

import gc
import logging
import shutil
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor

from sprint.base.cpu import keep_freed_memory
from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.base.names import resolve
from sprint.data.batch import Batch, Encoded, Item, Prompt
from sprint.data.batching import collate, encode
from sprint.data.cache.items import CachedItems
from sprint.data.encode.encoder import TeacherDraws, load_draws
from sprint.data.source import ItemSource, Source, open_items, open_source
from sprint.engine.batches import to_device
from sprint.engine.engine import Engine
from sprint.models.encoders import TEXT_UNIT, Family, encode_null
from sprint.models.families import load_family
from sprint.models.teacher import DENSE_TIME
from sprint.recipe.load import recipe_hash, recipe_text
from sprint.recipe.schema import AdaptStart, DataKind, Precision, Recipe
from sprint.train.adapt import AdaptStage, draw_flow, noised
from sprint.train.checks import check_share, check_teacher
from sprint.train.costs import note_cost
from sprint.train.distill import DistillStage
from sprint.train.folder import claim
from sprint.train.log import RunLog
from sprint.train.loop import Interrupted, Rhythm, Stage, train
from sprint.train.report.write import model_facts, write_page
from sprint.train.start import calibrated, with_ones
from sprint.weights.export import export_student, export_teacher
from sprint.weights.load import load_teacher, understand_teacher

log = logging.getLogger(__name__)
CALIBRATION_BATCHES, CALIBRATION_SIZE = 4, 32


class Run:
    """A recipe at work in its folder."""

    def __init__(self, recipe: Recipe, root: Path = Path("runs"), engine: Engine | None = None):
        self.recipe = recipe
        self.folder = root / recipe.name
        self.engine = engine or Engine.of(recipe)
        if self.engine.device.type == "cpu":
            keep_freed_memory()
        self.engine.share(recipe.adapt.batch_size)
        check_share(recipe, self.engine)
        self._open_inputs()
        self.engine.broadcast_from_main(self._claim)

    def _claim(self) -> None:
        claim(self.folder, recipe_hash(self.recipe))
        write_whole(self.folder / "recipe.yaml", recipe_text(self.recipe))
        note, is_now = self.folder / "data.fingerprint", self.source.fingerprint or ""
        if note.exists() and note.read_text() != is_now:
            log.warning(
                "%s: not the files that the run began with; its order is another from here on",
                self.recipe.data.path,
            )
        write_whole(note, is_now)

    def _open_inputs(self) -> None:
        """Data, teacher, text side and autoencoder: what is wrong with them shows before the folder is touched."""
        recipe = self.recipe
        if recipe.evaluate.prompts:
            import sprint.train.report.columns  # noqa: F401 (scoring wants an extra: say so now, not after training)
        trained = (self.folder / "teacher").exists()
        teacher = understand_teacher(str(self.folder / "teacher") if trained else resolve(recipe.teacher))
        if not trained:
            check_teacher(recipe, teacher.config, teacher.sizes.depth)
        self._open_source()
        for batch_size in (recipe.adapt.batch_size, recipe.distill.batch_size):
            self.source.batched(batch_size)  # there may be too few samples of every shape
        first = self.encode(self.source.samples(range(1)))
        self.latent_shape: tuple[int, int, int] = tuple(first.latent.shape[1:])
        seen = self.latent_shape[0], first.text.shape[2]
        takes = teacher.sizes.channels, teacher.sizes.text_width
        if seen != takes:
            raise SprintError(
                f"{recipe.data.path or recipe.data.kind.value}: latents of {seen[0]} channels and texts {seen[1]} "
                f"wide, but the teacher takes {takes[0]} and {takes[1]}: data of another family"
            )

    def _open_source(self) -> None:
        """The samples, and the empty prompt; a cache brings both, and then nothing that encodes is loaded."""
        data, bad = self.recipe.data, self.folder / "bad_samples.jsonl"
        if data.kind is not DataKind.cache:
            self.source: Source = open_source(data, bad_file=bad, share=self.engine.broadcast_numbers)
            self.null: tuple[Tensor, Tensor] = encode_null(self.family)
            return
        items = open_items(data)
        of_scenes = isinstance(items, CachedItems) and items.settings.data["kind"] == DataKind.scenes.value
        if self.recipe.evaluate.prompts and not of_scenes:
            raise SprintError(
                "evaluate.prompts must be 0 with a cache of anything but scenes: only scenes can be scored"
            )
        if isinstance(items, CachedItems):
            items.check(self.family_name, self.recipe.text)
        null = items.null if items.has_null else encode_null(self.family)
        self.null = tuple(x.to(self.engine.device) for x in null)
        self.source = ItemSource(items, data, bad_file=bad, share=self.engine.broadcast_numbers)

    @property
    def family_name(self) -> str:
        return self.recipe.teacher_family or self.recipe.teacher

    @cached_property
    def family(self) -> Family:
        """Text side and autoencoder, loaded when they are first asked for."""
        text, bf16 = self.recipe.text, self.recipe.precision is Precision.bf16
        dtype = torch.bfloat16 if bf16 else torch.float32
        family = load_family(self.family_name, text.max_length, text.instruction, dtype)
        needed_at_the_end = self.recipe.data.kind is DataKind.cache  # to be exported
        return family if needed_at_the_end else family.to(self.engine.device)

    @cached_property
    def draws(self) -> TeacherDraws:
        """The teacher as it was, where it draws the pictures that prompts lack."""
        return load_draws(self.recipe, self.family)

    def encode(self, samples: list[Item]) -> Batch:
        """A batch for either stage; compiled graphs are made anew for each length of text, so they get one."""
        unit = self.recipe.text.max_length if self.recipe.compile else TEXT_UNIT
        if isinstance(samples[0], Encoded):
            return collate(samples, self.engine.device, unit, self.recipe.text.max_length)
        if isinstance(samples[0], Prompt):
            return self.draws.batch_of(samples, unit)
        return encode(samples, self.family, self.recipe.micro_batch_size, unit)

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
        return bool(self.engine.broadcast_from_main(lambda: "yes" if (self.folder / part).exists() else None))

    def adapt(self, log: RunLog) -> None:
        teacher, time_scale = load_teacher(resolve(self.recipe.teacher))
        network = self.start_of_adaptation(teacher, time_scale)
        stage = AdaptStage(self.recipe, self.engine, network, self.null)
        self.train_stage(stage, log)
        network, facts = stage.result(), model_facts(self.recipe)
        self._finish(stage, lambda: export_teacher(self.folder / "teacher", network, self.family, facts))

    def start_of_adaptation(
        self, teacher: ModelMixin, time_scale: float, own_time_scale: float = DENSE_TIME
    ) -> ModelMixin:
        """The adapted network before its first step, calibrated on the run's own data or at ones.

        time_scale      the teacher's
        own_time_scale  the adapted network's: dense, or as the teacher's
        """
        if self.recipe.adapt.start is AdaptStart.ones:
            return with_ones(teacher, self.recipe.adapt.qk_norm)
        teacher.to(self.engine.device)
        size = min(CALIBRATION_SIZE, self.recipe.adapt.batch_size)
        source, batches = self.source.batched(size), []
        for i in range(CALIBRATION_BATCHES):
            batch = self.encode(source.samples(range(i * size, (i + 1) * size)))
            shape, shift = tuple(batch.latent.shape[1:]), self.recipe.adapt.shift
            draws = draw_flow(self.recipe.seed, -1 - i, size, shape, shift, dropout=0.0)
            draws = to_device(draws, self.engine.device)
            batches.append((noised(batch.latent, draws), draws.t_fm, batch))
        return calibrated(teacher, batches, time_scale, self.recipe.adapt.qk_norm, own_time_scale)

    def distill(self, log: RunLog) -> None:
        adapted, _ = load_teacher(self.folder / "teacher")
        stage = DistillStage(self.recipe, self.engine, adapted, self.null, self.latent_shape)
        self.train_stage(stage, log)
        student, facts = stage.result(), model_facts(self.recipe)
        facts["times"] = self.recipe.distill.student_times
        self._finish(
            stage,
            lambda: export_student(
                self.folder / "student", student.network, student.logvar, self.family, facts
            ),
        )

    def train_stage(self, stage: Stage, log: RunLog) -> None:
        """A stage from where it is to its last step; its checkpoints stay until its result is written."""
        recipe, folder = self.recipe, self.folder / "checkpoints" / stage.name
        rhythm = Rhythm(recipe.save_every, recipe.log_every, recipe.data.workers)
        source = self.source.batched(stage.batch_size)
        seconds = train(stage, source, self.encode, self.engine, log, folder, rhythm)
        if self.engine.main_process:
            note_cost(self.folder, stage.name, seconds)

    def _finish(self, stage: Stage, export: Callable[[], Path]) -> None:
        """On the main process: write the stage's result; its checkpoints are then of no more use."""

        def work() -> None:
            export()
            shutil.rmtree(self.folder / "checkpoints" / stage.name, ignore_errors=True)  # none after 0 steps

        self.engine.broadcast_from_main(work)
        for updater in stage.updaters():
            updater.trained.close()


def _let_go() -> None:
    """Modules with hooks are circles that hold each other: collected now, and not when memory is short."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def distill(recipe: Recipe, root: Path = Path("runs"), command: str = "") -> Path | None:
    """Everything that `sprint distill` does.  -> the page; None on processes other than the main one

    Raises SprintError for a recipe that cannot run, `Interrupted` after a signal, once the run is saved.
    """
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
    if skipped := run.source.skipped:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        print(f"sprint: passed over {counts}; see {run.folder / 'bad_samples.jsonl'}", file=sys.stderr)
    return write_page(recipe, run.folder, command) if engine.main_process else None
