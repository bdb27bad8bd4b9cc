"""All randomness of one update of stage 2: for the whole batch, from (seed, step) alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from sprint.base.random import step_generator
from sprint.maths.schedule import lognormal_trig_times, with_max_time
from sprint.maths.trigflow import HALF_PI
from sprint.recipe.schema import Matching, Recipe, Renoising

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
    nearby_noise              [B, P]: what is added for R1 and R2, as many as are on
    own_t, own_noise          [B, n + 1]: n steps of the student's own sample, then where two scores look at it; [B, 0]
                              without distribution matching
    """

    guidance: Tensor
    t: Tensor
    noise: Tensor
    start_t: Tensor
    start_noise: Tensor
    renoise_t: Tensor
    renoise_noise: Tensor
    second_t: Tensor
    nearby_noise: Tensor
    own_t: Tensor
    own_noise: Tensor


def draw(recipe: Recipe, step: int, latent_shape: tuple) -> Draws:
    """All phases draw alike; which step it is decides what."""
    settings = recipe.distill
    batch, adversarial = settings.batch_size, settings.adversarial
    generator = step_generator(recipe.seed, "distill", step)
    scales = torch.tensor(settings.guidance_scales, dtype=torch.float32)
    shape, kinds = (batch, *latent_shape), RENOISED[adversarial.renoising]
    # of streams of their own: what a recipe without them draws stays what it was
    nearby = step_generator(recipe.seed, "nearby", step)
    own_t, own_noise = draw_own(settings.matching, recipe.seed, step, shape)

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
        nearby_noise=torch.randn((batch, adversarial.penalties, *latent_shape), generator=nearby),
        own_t=own_t,
        own_noise=own_noise,
    )
    low, high = SECOND_STEP
    return draws._replace(second_t=draws.start_t * (low + (high - low) * draws.second_t))


def draw_own(matching: Matching, seed: int, step: int, shape: tuple) -> tuple[Tensor, Tensor]:
    """Times and noises of an update's own samples: steps falling from π/2, as many for all, and one time to look at.

    t_1 = π/2, t_k = min(drawn, t_{k-1}); the number of steps is uniform over 1 to `rollout`.  (rCM, arXiv 2510.08431)
    """
    batch, *latent_shape = shape
    if matching.weight == 0:
        return torch.zeros(batch, 0), torch.zeros(batch, 0, *latent_shape)
    generator = step_generator(seed, "matching", step)
    steps = int(torch.randint(1, matching.rollout + 1, (), generator=generator))
    count = steps + 1
    t = lognormal_trig_times(batch * count, matching.time.mean, matching.time.std, generator)
    t = t.view(batch, count)
    t[:, 0] = HALF_PI
    falling = t[:, :steps].cummin(dim=1).values
    noise = torch.randn((batch, count, *latent_shape), generator=generator)
    return torch.cat([falling, t[:, steps:]], dim=1), noise
