"""LADD: heads on the frozen teacher's features tell real from generated (SANA-Sprint §3.3; Algorithm 1)."""

from collections.abc import Callable

import torch
from torch import Tensor

from sprint.base.clock import Clock
from sprint.data.batch import Batch
from sprint.maths import losses
from sprint.maths.trigflow import SIGMA_DATA, diffuse
from sprint.models.discriminator import ARRANGEMENTS, swapped
from sprint.recipe.schema import Adversarial, Distill, NormGroups
from sprint.train.draws import Draws
from sprint.train.terms import Logged
from sprint.train.terms.sample import one_step_sample, second_step

REAL, GENERATED, MISALIGNED = range(3)  # kinds of samples


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
