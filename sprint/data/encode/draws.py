"""What the teacher draws for prompts that have no pictures."""

import torch
from torch import Tensor

from sprint.base.names import resolve
from sprint.base.random import step_generator
from sprint.data.batch import Batch, Prompt, parts
from sprint.models.encoders import TEXT_UNIT, Family
from sprint.models.view import TrigFlowView
from sprint.recipe.schema import Recipe
from sprint.sample.generate import TeacherGenerator
from sprint.weights.load import build_network, understand_teacher


class TeacherDraws:
    """What a teacher makes of prompts, with data.teacher_steps steps at data.guidance_scale.

    The noise comes from (data.seed, the prompt's position): but for rounding, a prompt's latent depends neither
    on its batch nor on the process. Raises `SprintError` where data.size does not divide into latent cells.

    largest   prompts in one forward, at most (0: all): the recipe's micro_batch_size
    """

    def __init__(self, teacher: TeacherGenerator, recipe: Recipe):
        self.teacher, self.data, self.largest = teacher, recipe.data, recipe.micro_batch_size

    def latents_of(self, prompts: list[Prompt]) -> Tensor:
        """-> unit-scale latents [B, C, h, w], float32, on the teacher's device"""
        return torch.cat([self._draw(prompts[part]) for part in parts(len(prompts), self.largest)])

    def batch_of(self, prompts: list[Prompt], unit: int = TEXT_UNIT) -> Batch:
        """Latents and embedded prompts; the text's length is a multiple of `unit`, or the family's longest."""
        text, mask = self.teacher.family.encode_trimmed([prompt.caption for prompt in prompts], unit)
        return Batch(self.latents_of(prompts), text, mask)

    def _draw(self, prompts: list[Prompt]) -> Tensor:
        data, captions = self.data, [prompt.caption for prompt in prompts]
        seeds = noise_seeds(data.seed, prompts)
        return self.teacher.latents(captions, seeds, data.teacher_steps, data.guidance_scale, data.size)


def noise_seeds(seed: int, prompts: list[Prompt]) -> list[int]:
    """Of the noise that becomes each prompt's picture, from data.seed and its position."""
    return [step_generator(seed, "prompts", prompt.position).initial_seed() for prompt in prompts]


def own_teacher(recipe: Recipe, family: Family) -> TeacherGenerator:
    """The recipe's own teacher, on the family's device and in its precision.  Raises SprintError as
    `load_teacher` does."""
    checkpoint = understand_teacher(resolve(recipe.teacher))
    network = build_network(checkpoint, family.text_encoder.dtype).to(family.device)
    view = TrigFlowView(network, checkpoint.time_scale).requires_grad_(False)
    return TeacherGenerator(view, family)
