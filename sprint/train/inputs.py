"""What a run begins with: its teacher, the samples, and the frozen networks that encode them."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sprint.base.errors import SprintError
from sprint.base.names import resolve
from sprint.data.batch import Batch, Encoded, Item, Prompt
from sprint.data.batching import collate, encode
from sprint.data.cache.items import CachedItems
from sprint.data.encode.encoder import TeacherDraws, load_draws
from sprint.data.source import ItemSource, Source, open_items, open_source
from sprint.engine.engine import Engine
from sprint.models.encoders import TEXT_UNIT, Family, encode_null
from sprint.models.families import load_family
from sprint.models.teacher import Sizes
from sprint.recipe.schema import DataKind, Precision, Recipe
from sprint.train.checks import check_teacher
from sprint.weights.load import understand_teacher


class Inputs:
    """Opened and tried on one sample, so that what is wrong with them shows before the run's folder is touched.

    source         samples by position
    null           the empty prompt: text [1, N, D] and mask [1, N], on the engine's device
    latent_shape   (C, h, w) of the first sample
    of_scenes      whether the built-in scenes are learned, which can be scored

    Raises SprintError for what is missing, and for parts that do not fit each other or the recipe.
    """

    def __init__(self, recipe: Recipe, folder: Path, engine: Engine):
        self.recipe, self.folder, self.engine = recipe, folder, engine
        self.of_scenes = recipe.data.kind is DataKind.scenes
        teacher = self._teacher_sizes()
        self.source, self.null = self._open_cache() if self._cached else self._open_data()
        for batch_size in (recipe.adapt.batch_size, recipe.distill.batch_size):
            self.source.batched(batch_size)  # there may be too few samples of every shape
        first = self.encode(self.source.samples(range(1)))
        self.latent_shape: tuple[int, int, int] = tuple(first.latent.shape[1:])
        self._check_fit(first, teacher)

    # ---- the teacher ------------------------------------------------------------------------------------

    def _teacher_sizes(self) -> Sizes:
        """Of the adapted teacher, if stage 1 is over, else of the recipe's."""
        adapted = self.folder / "teacher"
        if adapted.exists():
            return understand_teacher(str(adapted)).sizes
        teacher = understand_teacher(resolve(self.recipe.teacher))
        check_teacher(self.recipe, teacher.config, teacher.sizes.depth)
        return teacher.sizes

    def _check_fit(self, first: Batch, teacher: Sizes) -> None:
        data = self.recipe.data
        channels, width = first.latent.shape[1], first.text.shape[2]
        if (channels, width) != (teacher.channels, teacher.text_width):
            raise SprintError(
                f"{data.path or data.kind.value}: latents of {channels} channels and texts {width} "
                f"wide, but the teacher takes {teacher.channels} and {teacher.text_width}: "
                "data of another family"
            )

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
        return family if self._cached else family.to(self.engine.device)  # of a cache's run: to be exported

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
