"""What stage 2 adds up, to be held line by line against Algorithm 1 of SANA-Sprint (arXiv 2503.09641).

x_t = cos t · x_0 + sin t · σ_d ε, t in [0, π/2], x_0 = σ_d · latent; networks see x̂ = x_t / σ_d.

student   F_θ: (x_hat, t, text, mask, guidance) -> F [B, C, H, W], logvar [B]
teacher   F_T, the frozen adapted teacher: (x_hat, t, text, mask) -> F
tapped    its features: (x_hat, t, text, mask) -> one [B, N, D] for each tapped block
heads     the discriminator on them: (features, samples in a group) -> logits [B, L]
clock     on which each term marks its parts

A term takes a batch, or a part of one, with its draws, and gives its loss, a scalar, and scalars to be logged.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sprint.base.clock import Clock
from sprint.data.batch import Batch
from sprint.maths import losses
from sprint.maths.dual import value_and_tangent
from sprint.maths.trigflow import SIGMA_DATA, data_estimate, diffuse, noise_estimate
from sprint.models.discriminator import ARRANGEMENTS, swapped
from sprint.models.guidance import GuidedText, guided_velocity
from sprint.recipe.schema import Adversarial, Consistency, Distill, NormGroups
from sprint.train.draws import Draws

Logged = dict[str, Tensor]
REAL, GENERATED, MISALIGNED = range(3)  # kinds of samples


# ---- sCM --------------------------------------------------------------------------------------------


def teacher_velocity(teacher: Callable, x_t: Tensor, draws: Draws, guided: GuidedText) -> Tensor:
    """D = σ_d · (F_u + w (F_c − F_u)) = dx_t/dt along the guided teacher's flow."""
    return SIGMA_DATA * guided_velocity(teacher, x_t / SIGMA_DATA, draws.t, guided, draws.guidance)


def consistency_term(
    student: Callable,
    teacher: Callable,
    batch: Batch,
    draws: Draws,
    guided: GuidedText,
    r: float,
    settings: Consistency,
    clock: Clock,
) -> tuple[Tensor, Logged]:
    """L_sCM.  (Algorithm 1; sCM, arXiv 2410.11081, Eq. 8)

    guided  the batch's prompts and as many null prompts
    r       the tangent's warm-up, 0 to 1
    """
    t = draws.t
    x_t = diffuse(SIGMA_DATA * batch.latent, draws.noise, t)
    with clock.part("teacher"), torch.no_grad():
        D = teacher_velocity(teacher, x_t, draws, guided)

    logvar = None

    def F_theta(x_hat, t):
        nonlocal logvar
        F, logvar = student(x_hat, t, batch.text, batch.mask, draws.guidance)
        return F

    with clock.part("student"):
        F, F_prime = value_and_tangent(F_theta, x_t / SIGMA_DATA, t, *losses.tangent_inputs(t, D))
    F_minus = F.detach()
    g = losses.consistency_tangent(F_minus, F_prime, D, x_t, t, r)
    if settings.normalise_tangent:
        g = losses.normalise_tangent(g, settings.tangent_normalisation)
    loss = losses.consistency_loss(F, F_minus, g, logvar, t)
    tangent_norm = torch.linalg.vector_norm(F_prime, dim=(1, 2, 3)).mean()
    return loss, {"loss_scm": loss, "tangent_norm": tangent_norm, "logvar": logvar.mean()}


# ---- the sample that LADD looks at ------------------------------------------------------------------


class Sample(NamedTuple):
    """x̂_0 = f_θ(x_t, t) in one step from x_t, the network's output F on the way, and its log-variance [B]."""

    x_0: Tensor
    x_t: Tensor
    F: Tensor
    logvar: Tensor


def one_step_sample(student: Callable, batch: Batch, draws: Draws) -> Sample:
    """From the noised data at t = start_t, or from pure noise where that is π/2 (max-time weighting, §3.3)."""
    x_t = diffuse(SIGMA_DATA * batch.latent, draws.start_noise, draws.start_t)
    F, logvar = student(x_t / SIGMA_DATA, draws.start_t, batch.text, batch.mask, draws.guidance)
    return Sample(data_estimate(x_t, F, draws.start_t), x_t, F, logvar)


@torch.no_grad()
def second_step(student: Callable, sample: Sample, batch: Batch, draws: Draws) -> Tensor:
    """f_θ(x_s, s) with x_s on the circle through the sample and the noise that its own F tells, s = second_t."""
    s = draws.second_t
    noise = noise_estimate(sample.x_t, sample.F, draws.start_t) / SIGMA_DATA
    x_s = diffuse(sample.x_0, noise, s)
    F, _ = student(x_s / SIGMA_DATA, s, batch.text, batch.mask, draws.guidance)
    return data_estimate(x_s, F, s)


# ---- LADD -------------------------------------------------------------------------------------------


def renoised_features(tapped: Callable, x_0: Tensor, draws: Draws, batch: Batch, kind: int) -> list[Tensor]:
    """What the frozen teacher sees of x_0 at the discriminator's own noise level: its kind's, or that of all kinds."""
    own = kind if draws.renoise_t.shape[1] > 1 else 0
    t = draws.renoise_t[:, own]
    x_t = diffuse(x_0, draws.renoise_noise[:, own], t)
    return tapped(x_t / SIGMA_DATA, t, batch.text, batch.mask)


def sample_term(
    student: Callable,
    tapped: Callable,
    heads: Callable,
    batch: Batch,
    draws: Draws,
    settings: Distill,
    clock: Clock,
) -> tuple[Tensor, Logged]:
    """λ L_adv of a one-step sample and, if asked for, its weighted distance from what a second step makes of it."""
    target = None
    with clock.part("student"):
        sample = one_step_sample(student, batch, draws)
        if settings.self_consistency > 0:
            target = second_step(student, sample, batch, draws)
    generated_logits = GENERATED_LOGITS[settings.adversarial.norm_groups]
    logits = generated_logits(tapped, heads, batch, draws, sample.x_0, settings.adversarial.neighbours, clock)
    adversarial = losses.generator_adversarial_loss(logits)
    # + 0 · logvar: every weight gets a gradient, or DDP would wait for those that have none
    loss = settings.adversarial.weight * adversarial + 0.0 * sample.logvar.sum()
    if target is None:
        return loss, {"loss_adv": adversarial}
    distance = losses.self_consistency_loss(sample.x_0, target)
    return loss + settings.self_consistency * distance, {"loss_adv": adversarial, "loss_self": distance}


def logits_beside_real(
    tapped: Callable, heads: Callable, batch: Batch, draws: Draws, x_0: Tensor, neighbours: int, clock: Clock
) -> Tensor:
    """Of generated x_0, for L_adv.  (Algorithm 1; Eq. 10)

    The heads see real and generated side by side, so that local batch norm cannot hide the difference.
    """
    arranged = ARRANGEMENTS[NormGroups.mixed]
    with clock.part("features"), torch.no_grad():
        real = renoised_features(tapped, SIGMA_DATA * batch.latent, draws, batch, REAL)
    with clock.part("features"):
        fake = renoised_features(tapped, x_0, draws, batch, GENERATED)
        mixed = [arranged.join(*kinds) for kinds in zip(real, fake, strict=True)]
        del real, fake
    with clock.part("heads"):
        logits = heads(mixed, arranged.group(neighbours, 2)).float()
    return arranged.part(logits, 2)[GENERATED]


def logits_alone(
    tapped: Callable, heads: Callable, batch: Batch, draws: Draws, x_0: Tensor, neighbours: int, clock: Clock
) -> Tensor:
    """The same where the heads see generated samples only: a forward of the teacher less."""
    with clock.part("features"):
        fake = renoised_features(tapped, x_0, draws, batch, GENERATED)
    with clock.part("heads"):
        return heads(fake, neighbours).float()


GENERATED_LOGITS = {NormGroups.mixed: logits_beside_real, NormGroups.separate: logits_alone}


def discriminator_term(
    student: Callable,
    tapped: Callable,
    heads: Callable,
    batch: Batch,
    draws: Draws,
    settings: Adversarial,
    clock: Clock,
) -> tuple[Tensor, Logged]:
    """L_D, the hinge: real against generated and, if asked for, data under a neighbour's prompt.

    (Algorithm 1; Eq. 11)
    """
    arranged = ARRANGEMENTS[settings.norm_groups]
    with torch.no_grad():
        real = SIGMA_DATA * batch.latent
        with clock.part("student"):
            pictures = [real, one_step_sample(student, batch, draws).x_0]
        if settings.misaligned_pairs:
            pictures.append(swapped(real, settings.neighbours))
        with clock.part("features"):
            features = [renoised_features(tapped, x_0, draws, batch, k) for k, x_0 in enumerate(pictures)]
            joined = [arranged.join(*kinds) for kinds in zip(*features, strict=True)]
            del features
    with clock.part("heads"):
        logits = heads(joined, arranged.group(settings.neighbours, len(pictures))).float()
    real_logits, *fake_logits = arranged.part(logits, len(pictures))
    loss = losses.discriminator_hinge_loss(real_logits, torch.cat(fake_logits))
    return loss, {"logit_real": real_logits.mean(), "logit_fake": fake_logits[0].mean()}
