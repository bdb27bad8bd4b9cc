"""All randomness of one update of stage 2: for the whole batch, from (seed, step) alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from sprint.base.random import step_generator
from sprint.maths.schedule import lognormal_trig_times, with_max_time
from sprint.recipe.schema import Recipe, Renoising

# draws for the kinds of samples: one for all, or real, generated, misaligned
RENOISED = {Renoising.shared: 1, Renoising.separate: 3}
SECOND_STEP = (0.3, 0.7)  # where it starts, as a share of the time of the first


class Draws(NamedTuple):
    """Every tensor has the batch first.

    guidance                  [B], the scale the student is told
    t, noise                  where sCM looks (generator only)
    start_t, start_noise      where the student starts its one-step sample, π/2 for some
    renoise_t, renoise_noise  where the discriminator looks at it: [B, K], for each of K kinds of samples or for all
    second_t                  where a second step, with the noise of the first, starts from that sample
    """

    guidance: Tensor
    t: Tensor
    noise: Tensor
    start_t: Tensor
    start_noise: Tensor
    renoise_t: Tensor
    renoise_noise: Tensor
    second_t: Tensor


def draw(recipe: Recipe, step: int, latent_shape: tuple) -> Draws:
    """Both phases draw alike; which step it is decides what."""
    settings = recipe.distill
    batch, adversarial = settings.batch_size, settings.adversarial
    generator = step_generator(recipe.seed, "distill", step)
    scales = torch.tensor(settings.guidance_scales, dtype=torch.float32)
    shape, kinds = (batch, *latent_shape), RENOISED[adversarial.renoising]

    def times(density, count=batch):
        return lognormal_trig_times(count, density.mean, density.std, generator)

    draws = Draws(
        guidance=scales[torch.randint(len(scales), (batch,), generator=generator)],
        t=times(settings.consistency.time),
        noise=torch.randn(shape, generator=generator),
        start_t=with_max_time(times(settings.consistency.time), adversarial.max_time_probability, generator),
        start_noise=torch.randn(shape, generator=generator),
        renoise_t=times(adversarial.time, batch * kinds).view(batch, kinds),
        renoise_noise=torch.randn((batch, kinds, *latent_shape), generator=generator),
        second_t=torch.rand(batch, generator=generator),
    )
    low, high = SECOND_STEP
    return draws._replace(second_t=draws.start_t * (low + (high - low) * draws.second_t))
