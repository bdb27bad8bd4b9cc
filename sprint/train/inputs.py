"""What a run begins with: its teacher, the samples, and the frozen networks that encode them."""

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sprint.base.errors import SprintError
from sprint.base.names import resolve
from sprint.data.batch import Batch, Encoded, Item, Prompt, Traced
from sprint.data.batching import collate, encode
from sprint.data.cache.items import CachedItems, check_trajectories
from sprint.data.encode.draws import TeacherDraws, own_teacher
from sprint.data.encode.traces import TeacherTraces
from sprint.data.source import ItemSource, Source, open_items, open_source
from sprint.engine.engine import Engine
from sprint.models.encoders import TEXT_UNIT, Family, encode_null
from sprint.models.families import load_family
from sprint.models.teacher import Sizes
from sprint.recipe.schema import DataKind, Precision, Recipe
from sprint.sample.generate import TeacherGenerator
from sprint.train.checks import check_teacher
from sprint.weights.checkpoint import Checkpoint
from sprint.weights.identity import hash_files
from sprint.weights.load import understand_teacher

log = logging.getLogger(__name__)


class Inputs:
    """Opened and tried on one sample, so that what is wrong with them shows before the run's folder is touched.

    source         samples by position
    null           the empty prompt: text [1, N, D] and mask [1, N], on the engine's device
    latent_shape   (C, h, w) of the first sample
    teacher_weights   how many numbers the teacher has
    of_scenes      whether the built-in scenes are learned, which can be scored

    Raises SprintError for what is missing, and for parts that do not fit each other or the recipe.
    """

    def __init__(self, recipe: Recipe, folder: Path, engine: Engine):
        self.recipe, self.folder, self.engine = recipe, folder, engine
        self.of_scenes = recipe.data.kind is DataKind.scenes
        self._checkpoint = self._teacher()
        teacher, self.teacher_weights = self._checkpoint.sizes, self._checkpoint.parameters
        self.source, self.null = self._open_cache() if self._cached else self._open_data()
        for batch_size in (recipe.adapt.batch_size, recipe.distill.batch_size):
            self.source.batched(batch_size)  # there may be too few samples of every shape
        first = self._first()
        self.latent_shape: tuple[int, int, int] = tuple(first.latent.shape[1:])
        self._check_fit(first, teacher)

    # ---- the teacher ------------------------------------------------------------------------------------

    def _teacher(self) -> Checkpoint:
        """The adapted teacher, if stage 1 is over, else the recipe's; unread."""
        adapted = self.folder / "teacher"
        if adapted.exists():
            return understand_teacher(str(adapted))
        teacher = understand_teacher(resolve(self.recipe.teacher))
        check_teacher(self.recipe, teacher.config, teacher.sizes.depth)
        return teacher

    def _check_fit(self, first: Batch, teacher: Sizes) -> None:
        data = self.recipe.data
        channels, width = first.latent.shape[1], first.text.shape[2]
        if (channels, width) != (teacher.channels, teacher.text_width):
            raise SprintError(
                f"{data.path or data.kind.value}: latents of {channels} channels and texts {width} "
                f"wide, but the teacher takes {teacher.channels} and {teacher.text_width}: "
                "data of another family"
            )

    def _compare_teachers(self, made_by: str | None) -> None:
        """Trajectories may teach another teacher's student, but hardly ever should.  made_by: SHA-256"""
        adapted = (self.folder / "teacher").exists()  # then they were compared before stage 1
        if not adapted and made_by != hash_files(self._checkpoint.source.files):
            log.warning(
                "%s: trajectories of another teacher than %s", self.recipe.data.path, self.recipe.teacher
            )

    def _first(self) -> Batch | Traced:
        """One sample as each stage will see it.  -> the last stage's"""
        traced = self.recipe.distill.trajectories.states > 0
        for trajectories in [False] * (not traced or self.recipe.adapt.steps > 0) + [True] * traced:
            source, encode = self.feed(trajectories)
            first = encode(source.samples(range(1)))
        return first

    # ---- samples, and the empty prompt ------------------------------------------------------------------

    @property
    def bad_file(self) -> Path:
        """Where samples that cannot be read are listed."""
        return self.folder / "bad_samples.jsonl"

    @property
    def _cached(self) -> bool:
        return self.recipe.data.kind is DataKind.cache

    def _open_data(self) -> tuple[Source, tuple[Tensor, Tensor]]:
        source = open_source(self.recipe.data, bad_file=self.bad_file, share=self.engine.broadcast_numbers)
        return source, encode_null(self.family)

    def _open_cache(self) -> tuple[Source, tuple[Tensor, Tensor]]:
        """A cache may bring the empty prompt too, and then nothing that encodes is loaded."""
        recipe, items = self.recipe, open_items(self.recipe.data)
        ours = isinstance(items, CachedItems)
        check_trajectories(items, recipe)
        if recipe.distill.trajectories.states:
            self._compare_teachers(items.settings.weights.get("teacher"))
        if ours:
            items.check(self.family_name, recipe.text)
            self.of_scenes = items.settings.data["kind"] == DataKind.scenes.value
        text, mask = items.null if items.has_null else encode_null(self.family)
        source = ItemSource(items, recipe.data, bad_file=self.bad_file, share=self.engine.broadcast_numbers)
        return source, (text.to(self.engine.device), mask.to(self.engine.device))

    # ---- from samples to batches ------------------------------------------------------------------------

    @property
    def family_name(self) -> str:
        return self.recipe.teacher_family or self.recipe.teacher

    @cached_property
    def family(self) -> Family:
        """Text side and autoencoder, loaded when they are first asked for."""
        text, bf16 = self.recipe.text, self.recipe.precision is Precision.bf16
        dtype = torch.bfloat16 if bf16 else torch.float32
        family = load_family(self.family_name, text.max_length, text.instruction, dtype)
        if self._cached:
            return family  # to be exported
        prompts = self.recipe.data.kind is DataKind.prompts
        return family.text_to(self.engine.device) if prompts else family.to(self.engine.device)

    @cached_property
    def drawing(self) -> TeacherGenerator:
        """The teacher as it was, where it draws what prompts say."""
        return own_teacher(self.recipe, self.family)

    def feed(self, trajectories: bool) -> tuple[Source, Callable[[list[Item]], Batch | Traced]]:
        """What a stage reads, and how it becomes a batch: with `trajectories` one that holds them."""
        if not trajectories:
            return self.source, self.encode
        return (self.source, self._collate) if self._cached else (self.source.prompted(), self._trace)

    def encode(self, samples: list[Item]) -> Batch:
        """A batch of pictures alone."""
        if isinstance(samples[0], Encoded):
            return self._collate([sample._replace(trajectory=None) for sample in samples])
        if isinstance(samples[0], Prompt):
            return TeacherDraws(self.drawing, self.recipe).batch_of(samples, self._text_unit)
        return encode(samples, self.family, self.recipe.micro_batch_size, self._text_unit)

    @property
    def _text_unit(self) -> int:
        """Compiled graphs are made anew for each length of text, so they get one."""
        return self.recipe.text.max_length if self.recipe.compile else TEXT_UNIT

    def _collate(self, samples: list[Encoded]) -> Batch | Traced:
        return collate(samples, self.engine.device, self._text_unit, self.recipe.text.max_length)

    def _trace(self, prompts: list[Prompt]) -> Traced:
        return TeacherTraces(self.drawing, self.recipe).batch_of(prompts, self._text_unit)
