"""Whole trajectories: the way of a guided teacher from noise to what a prompt says, with every state on it."""

import torch
from torch import Tensor

from sprint.base.random import on_device, step_generator
from sprint.data.batch import Prompt, Traced, Trajectory, parts
from sprint.data.encode.draws import noise_seeds
from sprint.maths.samplers import Trace
from sprint.maths.schedule import teacher_times
from sprint.models.encoders import TEXT_UNIT
from sprint.recipe.schema import Recipe
from sprint.sample.generate import TeacherGenerator


class TeacherTraces:
    """Trajectories of distill.trajectories.steps steps, at guidance scales of distill.guidance_scales.

    Noise and scale come from (data.seed, the prompt's position): but for rounding, a trajectory depends neither on
    its batch nor on the process. Raises `SprintError` where data.size does not divide into latent cells.
    """

    def __init__(self, teacher: TeacherGenerator, recipe: Recipe):
        self.teacher, self.recipe = teacher, recipe
        self.times = teacher_times(recipe.distill.trajectories.steps)

    def batch_of(self, prompts: list[Prompt], unit: int = TEXT_UNIT) -> Traced:
        """The latents at which the trajectories end, embedded prompts and the trajectories, on the teacher's device.

        unit   the text's length is a multiple of it, or the family's longest
        """
        family, captions = self.teacher.family, [prompt.caption for prompt in prompts]
        text, mask = family.encode_trimmed(captions, unit)
        guidance = self._guidance(prompts)
        divided = parts(len(prompts), self.recipe.micro_batch_size)
        traces = [self._trace(prompts[part], text[part], mask[part], guidance[part]) for part in divided]
        states, velocity, latent = map(torch.cat, zip(*traces, strict=True))
        t = torch.tensor(self.times[:-1]).expand(len(prompts), -1)
        return Traced(
            latent,
            text,
            mask,
            Trajectory(states, velocity, on_device(t, family.device), on_device(guidance, family.device)),
        )

    def _trace(self, prompts: list[Prompt], text: Tensor, mask: Tensor, guidance: Tensor) -> Trace:
        data, captions = self.recipe.data, [prompt.caption for prompt in prompts]
        seeds = noise_seeds(data.seed, prompts)
        return self.teacher.trace(captions, text, mask, seeds, guidance, self.times, data.size)

    def _guidance(self, prompts: list[Prompt]) -> Tensor:
        """One of the scales for each prompt, all equally likely.  -> [B]"""
        scales = torch.tensor(self.recipe.distill.guidance_scales, dtype=torch.float32)
        generators = [step_generator(self.recipe.data.seed, "guidance", p.position) for p in prompts]
        return torch.stack([scales[torch.randint(len(scales), (), generator=g)] for g in generators])
