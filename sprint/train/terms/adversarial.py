"""LADD: heads on the frozen teacher's features tell real from generated (SANA-Sprint §3.3; Algorithm 1)."""

from collections.abc import Callable

import torch
from torch import Tensor

from sprint.base.clock import Clock
from sprint.data.batch import Batch
from sprint.maths import losses
from sprint.maths.trigflow import SIGMA_DATA, diffuse
from sprint.models.discriminator import ARRANGEMENTS, Arrangement, swapped
from sprint.recipe.schema import Adversarial, AdversarialLoss, Distill, NormGroups
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
    generator_loss = GENERATOR_LOSSES[settings.adversarial.loss]
    adversarial = generator_loss(tapped, heads, batch, draws, sample.x_0, settings.adversarial, clock)
    # + 0 · logvar: every weight gets a gradient, or DDP would wait for those that have none
    loss = settings.adversarial.weight * adversarial + 0.0 * sample.logvar.sum()
    if target is None:
        return loss, {"loss_adv": adversarial}
    distance = losses.self_consistency_loss(sample.x_0, target)
    return loss + settings.self_consistency * distance, {"loss_adv": adversarial, "loss_self": distance}


def hinge_of_sample(
    tapped: Callable,
    heads: Callable,
    batch: Batch,
    draws: Draws,
    x_0: Tensor,
    settings: Adversarial,
    clock: Clock,
) -> Tensor:
    """L_adv of generated x_0, as the paper has it.  (Eq. 10)"""
    generated_logits = GENERATED_LOGITS[settings.norm_groups]
    logits = generated_logits(tapped, heads, batch, draws, x_0, settings.neighbours, clock)
    return losses.generator_adversarial_loss(logits)


def relativistic_of_sample(
    tapped: Callable,
    heads: Callable,
    batch: Batch,
    draws: Draws,
    x_0: Tensor,
    settings: Adversarial,
    clock: Clock,
) -> Tensor:
    """The same against the real sample of each prompt."""
    arranged = ARRANGEMENTS[settings.norm_groups]
    real, fake = logits_of_pairs(arranged, tapped, heads, batch, draws, x_0, settings.neighbours, clock)
    return losses.generator_relativistic_loss(real, fake)


GENERATOR_LOSSES = {
    AdversarialLoss.hinge: hinge_of_sample,
    AdversarialLoss.relativistic: relativistic_of_sample,
}
DISCRIMINATOR_LOSSES = {
    AdversarialLoss.hinge: losses.discriminator_hinge_loss,
    AdversarialLoss.relativistic: losses.discriminator_relativistic_loss,
}


def logits_of_pairs(
    arranged: Arrangement,
    tapped: Callable,
    heads: Callable,
    batch: Batch,
    draws: Draws,
    x_0: Tensor,
    neighbours: int,
    clock: Clock,
) -> tuple[Tensor, Tensor]:
    """Of real samples and of generated x_0 beside them."""
    with clock.part("features"), torch.no_grad():
        real = renoised_features(tapped, SIGMA_DATA * batch.latent, draws, batch, REAL)
    with clock.part("features"):
        fake = renoised_features(tapped, x_0, draws, batch, GENERATED)
        joined = [arranged.join(*kinds) for kinds in zip(real, fake, strict=True)]
        del real, fake
    with clock.part("heads"):
        logits = heads(joined, arranged.group(neighbours, 2)).float()
    real_logits, fake_logits = arranged.part(logits, 2)
    return real_logits, fake_logits


def logits_beside_real(
    tapped: Callable, heads: Callable, batch: Batch, draws: Draws, x_0: Tensor, neighbours: int, clock: Clock
) -> Tensor:
    """Of generated x_0, for L_adv.  (Algorithm 1; Eq. 10)

    The heads see real and generated side by side, so that local batch norm cannot hide the difference.
    """
    mixed = ARRANGEMENTS[NormGroups.mixed]
    return logits_of_pairs(mixed, tapped, heads, batch, draws, x_0, neighbours, clock)[GENERATED]


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
    """L_D: real against generated and, if asked for, data under a neighbour's prompt; R1 and R2, if asked for.

    (Algorithm 1; Eq. 11)
    """
    arranged = ARRANGEMENTS[settings.norm_groups]
    with torch.no_grad():
        real = SIGMA_DATA * batch.latent
        with clock.part("student"):
            seen = [(REAL, real), (GENERATED, one_step_sample(student, batch, draws).x_0)]
        if settings.misaligned_pairs:
            seen.append((MISALIGNED, swapped(real, settings.neighbours)))
        kinds = len(seen)
        seen += nearby(seen, draws, settings)
        with clock.part("features"):
            features = [renoised_features(tapped, x_0, draws, batch, kind) for kind, x_0 in seen]
            joined = [arranged.join(*each) for each in zip(*features, strict=True)]
            del features
    with clock.part("heads"):
        logits = heads(joined, arranged.group(settings.neighbours, len(seen))).float()
    parts = arranged.part(logits, len(seen))
    real_logits, *fake_logits = parts[:kinds]
    loss = DISCRIMINATOR_LOSSES[settings.loss](real_logits, torch.cat(fake_logits))
    logged = {"logit_real": real_logits.mean(), "logit_fake": fake_logits[0].mean()}
    for (kind, _), logits in zip(seen[kinds:], parts[kinds:], strict=True):
        name, weight = penalties(settings)[kind]
        logged[name] = losses.nearby_penalty(parts[kind], logits)
        loss = loss + weight * logged[name]
    return loss, logged


def penalties(settings: Adversarial) -> dict[int, tuple[str, float]]:
    """Name and weight of each that is on, by the kind of samples that it is on."""
    both = {REAL: ("loss_r1", settings.r1), GENERATED: ("loss_r2", settings.r2)}
    return {kind: (name, weight) for kind, (name, weight) in both.items() if weight > 0}


def nearby(seen: list[tuple[int, Tensor]], draws: Draws, settings: Adversarial) -> list[tuple[int, Tensor]]:
    """Samples for R1 and R2: x_0 + σ_d · sigma · n, of the kind that they are near to."""
    spread = SIGMA_DATA * settings.sigma
    return [
        (kind, seen[kind][1] + spread * draws.nearby_noise[:, index])
        for index, kind in enumerate(penalties(settings))
    ]
