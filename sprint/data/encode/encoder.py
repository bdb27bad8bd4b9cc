"""Samples into latents and embedded text: pictures through the frozen family, prompts through the teacher too."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sprint.base.errors import SprintError
from sprint.base.names import resolve
from sprint.base.random import step_generator
from sprint.data.batch import Batch, Encoded, Item, Prompt, Sample, parts
from sprint.data.batching import encode
from sprint.models.encoders import TEXT_UNIT, Family
from sprint.models.families import load_family
from sprint.models.view import TrigFlowView
from sprint.recipe.schema import Data, DataKind, Precision, Recipe
from sprint.sample.generate import TeacherGenerator
from sprint.weights.identity import family_weights, hash_files
from sprint.weights.load import build_network, understand_teacher


class Encoder:
    """The recipe's frozen family, and its teacher where there are prompts and no pictures."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.name, self.teacher = recipe.teacher_family or recipe.teacher, recipe.teacher
        dtype = torch.bfloat16 if recipe.precision is Precision.bf16 else torch.float32
        self.family = load_family(self.name, recipe.text.max_length, recipe.text.instruction, dtype).to(
            device
        )
        self.draws = load_draws(recipe, self.family) if recipe.data.kind is DataKind.prompts else None

    def weights(self) -> dict[str, str]:
        """SHA-256 of everything that encodes, by part."""
        weights = family_weights(self.name)
        if weights is None:
            raise SprintError(f"{self.name}: no weight files of text_encoder and vae there")
        if self.draws:
            weights["teacher"] = hash_files(understand_teacher(resolve(self.teacher)).source.files)
        return weights

    def __call__(self, items: list[Item]) -> list[Encoded]:
        """On the CPU, in the order of `items`, which may be pictures of several shapes."""
        groups: dict[tuple, list[int]] = {}
        for place, item in enumerate(items):
            groups.setdefault(item.picture.shape if isinstance(item, Sample) else (), []).append(place)
        encoded: dict[int, Encoded] = {}
        for places in groups.values():
            group = [items[place] for place in places]
            batch = self.draws.batch_of(group) if self.draws else encode(group, self.family)
            encoded |= zip(places, _separate(batch), strict=True)
        return [encoded[place] for place in range(len(items))]


def _separate(batch: Batch) -> Iterator[Encoded]:
    latents, texts, masks = (tensor.cpu() for tensor in batch)
    for latent, text, mask in zip(latents, texts, masks, strict=True):
        yield Encoded(latent, text[mask.bool()])


# ---- prompts ----------------------------------------------------------------------------------------


class TeacherDraws:
    """What a teacher makes of prompts, with data.teacher_steps steps at data.guidance_scale.

    The noise comes from (data.seed, the prompt's position): but for rounding, a prompt's latent depends neither
    on its batch nor on the process. Raises `SprintError` where data.size does not divide into latent cells.

    largest   prompts in one forward, at most (0: all)
    """

    def __init__(self, teacher: TeacherGenerator, data: Data, largest: int = 0):
        self.teacher, self.data, self.largest = teacher, data, largest

    def latents_of(self, prompts: list[Prompt]) -> Tensor:
        """-> unit-scale latents [B, C, h, w], float32, on the teacher's device"""
        return torch.cat([self._draw(prompts[part]) for part in parts(len(prompts), self.largest)])

    def batch_of(self, prompts: list[Prompt], unit: int = TEXT_UNIT) -> Batch:
        """Latents and embedded prompts; the text's length is a multiple of `unit`, or the family's longest."""
        text, mask = self.teacher.family.encode_trimmed([prompt.caption for prompt in prompts], unit)
        return Batch(self.latents_of(prompts), text, mask)

    def _draw(self, prompts: list[Prompt]) -> Tensor:
        data = self.data
        seeds = [step_generator(data.seed, "prompts", prompt.position).initial_seed() for prompt in prompts]
        captions = [prompt.caption for prompt in prompts]
        return self.teacher.latents(captions, seeds, data.teacher_steps, data.guidance_scale, data.size)


def load_draws(recipe: Recipe, family: Family) -> TeacherDraws:
    """The recipe's own teacher, on the family's device and in its precision.  Raises SprintError as
    `load_teacher` does."""
    checkpoint = understand_teacher(resolve(recipe.teacher))
    network = build_network(checkpoint, family.text_encoder.dtype).to(family.device)
    view = TrigFlowView(network, checkpoint.time_scale).requires_grad_(False)
    return TeacherDraws(TeacherGenerator(view, family), recipe.data, recipe.micro_batch_size)
