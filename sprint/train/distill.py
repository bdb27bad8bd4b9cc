"""Stage 2: sCM + LADD. Generator and discriminator take turns on successive batches.

Source: SANA-Sprint (arXiv 2503.09641, Algorithm 1), and the public trainer's settings.
The student F_θ, the frozen adapted teacher F_T (with guidance for sCM, its features for LADD), the heads.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor

from sprint import losses
from sprint.clock import Clock
from sprint.compiled import prepare_blocks
from sprint.data.batch import Batch, parts
from sprint.dist import step_generator
from sprint.dual import value_and_tangent
from sprint.ema import Ema
from sprint.engine import Engine, take, to_device
from sprint.errors import SprintError
from sprint.models.guidance import GuidedText, guided_velocity, with_null
from sprint.models.heads import DiscriminatorHeads, deinterleave, interleave
from sprint.models.student import Student, from_adapted
from sprint.models.taps import TappedTeacher
from sprint.models.text import TextMemory
from sprint.models.view import DENSE_TIME, TrigFlowView
from sprint.recipe import Distill, Recipe
from sprint.schedule import lognormal_trig_times, with_max_time
from sprint.train.update import Means, Updater
from sprint.trigflow import SIGMA_DATA, data_estimate, diffuse

GENERATOR, DISCRIMINATOR = "G", "D"


class Draws(NamedTuple):
    """All randomness of one update; every tensor has the batch first.

    guidance                  [B], the scale the student is told
    t, noise                  where sCM looks (generator only)
    start_t, start_noise      where the student starts its one-step sample, π/2 for some
    renoise_t, renoise_noise  where the discriminator looks at it
    """

    guidance: Tensor
    t: Tensor
    noise: Tensor
    start_t: Tensor
    start_noise: Tensor
    renoise_t: Tensor
    renoise_noise: Tensor


def draw(recipe: Recipe, step: int, latent_shape: tuple) -> Draws:
    """Both phases draw alike; which step it is decides what."""
    settings = recipe.distill
    batch, adversarial = settings.batch_size, settings.adversarial
    generator = step_generator(recipe.seed, "distill", step)
    scales = torch.tensor(settings.guidance_scales, dtype=torch.float32)
    shape = (batch, *latent_shape)

    def times(density):
        return lognormal_trig_times(batch, density.mean, density.std, generator)

    return Draws(
        guidance=scales[torch.randint(len(scales), (batch,), generator=generator)],
        t=times(settings.consistency.time),
        noise=torch.randn(shape, generator=generator),
        start_t=with_max_time(times(settings.consistency.time), adversarial.max_time_probability, generator),
        start_noise=torch.randn(shape, generator=generator),
        renoise_t=times(adversarial.time),
        renoise_noise=torch.randn(shape, generator=generator),
    )


def teacher_velocity(teacher: TrigFlowView, x_t: Tensor, draws: Draws, guided: GuidedText) -> Tensor:
    """D = σ_d · (F_u + w (F_c − F_u)) = dx_t/dt along the guided teacher's flow."""
    return SIGMA_DATA * guided_velocity(teacher, x_t / SIGMA_DATA, draws.t, guided, draws.guidance)


def one_step_sample(student: Student, batch: Batch, draws: Draws) -> Tensor:
    """x̂_0 = f_θ(x_t', t') from the noised data, or from pure noise where t' = π/2."""
    x_t = diffuse(SIGMA_DATA * batch.latent, draws.start_noise, draws.start_t)
    F = student(x_t / SIGMA_DATA, draws.start_t, batch.text, batch.mask, draws.guidance)
    return data_estimate(x_t, F, draws.start_t)


def renoised_features(tapped: TappedTeacher, x_0: Tensor, draws: Draws, batch: Batch) -> list[Tensor]:
    """What the frozen teacher sees of x_0 at the discriminator's own noise level."""
    x_t = diffuse(x_0, draws.renoise_noise, draws.renoise_t)
    return tapped(x_t / SIGMA_DATA, draws.renoise_t, batch.text, batch.mask)


class DistillStage:
    """State and updates of stage 2. Even steps train the student, odd ones the heads (if LADD is on)."""

    name = "distill"

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        adapted: SanaTransformer2DModel,
        null: tuple[Tensor, Tensor],
        latent_shape: tuple[int, int, int],
    ):
        self.recipe, self.engine = recipe, engine
        self.settings: Distill = recipe.distill
        self._check_neighbours()
        config = adapted.config
        torch.manual_seed(recipe.seed)
        network = from_adapted(adapted)
        self.student = engine.trainable(Student(network)).train()
        self._start_log_variance(math.prod(latent_shape))
        width = config.num_attention_heads * config.attention_head_dim
        taps = self.settings.adversarial.taps
        self.teacher = TrigFlowView(engine.frozen(adapted), DENSE_TIME)
        self.memory = TextMemory(adapted)
        for each in (network, adapted):
            prepare_blocks(each, recipe.compile, recipe.activation_checkpointing)
        self.null = (null[0].to(adapted.dtype), null[1])
        taken = [self.phase(step) for step in range(self.steps)]
        self.generator = Updater(self.student, self.settings.optimizer, engine, taken.count(GENERATOR))
        if self.settings.adversarial.weight > 0:
            self.heads = engine.trainable(DiscriminatorHeads(width, len(taps))).train()
            self.tapped = TappedTeacher(self.teacher, taps)
            settings = self.settings.adversarial.optimizer
            self.discriminator = Updater(self.heads, settings, engine, taken.count(DISCRIMINATOR))
        self.ema = Ema(self.student, self.settings.ema_decay) if self.settings.ema_decay else None
        self.generator_updates = 0
        self.clock = Clock(engine.device)

    def _check_neighbours(self) -> None:
        """A misaligned pair is a neighbour's picture, of the same micro-batch: one sample alone has no neighbour."""
        share = len(self.engine.share(self.batch_size))
        lonely = any(part.stop - part.start == 1 for part in parts(share, self.recipe.micro_batch_size))
        if lonely and self.settings.adversarial.weight > 0 and self.settings.adversarial.misaligned_pairs:
            raise SprintError(
                f"misaligned pairs need at least 2 samples in every micro-batch, and {share} a process in parts of "
                f"{self.recipe.micro_batch_size or share} leave 1 alone; change batch_size or micro_batch_size"
            )

    def _start_log_variance(self, values: int) -> None:
        """Where it would settle anyway; from zero it drowns one loss, then the other, on its way there."""
        density = self.settings.consistency.time
        t = lognormal_trig_times(
            4096, density.mean, density.std, step_generator(self.recipe.seed, "logvar", 0)
        )
        guidance = torch.full_like(t, sum(self.settings.guidance_scales) / len(self.settings.guidance_scales))
        t, guidance = t.to(self.engine.device), guidance.to(self.engine.device)
        self.student.start_log_variance(t, guidance, losses.settled_logvar(t, values))

    @property
    def steps(self) -> int:
        return self.settings.steps

    @property
    def batch_size(self) -> int:
        return self.settings.batch_size

    def phase(self, step: int) -> str:
        odd = step % 2 == 1
        return DISCRIMINATOR if odd and self.settings.adversarial.weight > 0 else GENERATOR

    def update(self, step: int, batch: Batch) -> Means:
        """One update on this process's share of batch number `step`; its phase is `phase(step)`."""
        engine = self.engine
        draws = draw(self.recipe, step, tuple(batch.latent.shape[1:]))
        draws = to_device(take(draws, engine.share(self.batch_size)), engine.device)
        generator_phase = self.phase(step) == GENERATOR
        terms = self._generator_terms if generator_phase else self._discriminator_terms
        updater = self.generator if generator_phase else self.discriminator
        means, size = Means(), len(batch.latent)
        updater.zero_grad()
        for part in parts(size, self.recipe.micro_batch_size):
            share = (part.stop - part.start) / size
            for loss, seen in terms(take(batch, part), take(draws, part)):
                with self.clock.part("backward"):
                    (share * loss).backward()
                means.add(share, loss=loss, **seen)
        with self.clock.part("optimizer"):
            norm, moved = updater.step()
            if generator_phase and self.ema:
                self.ema.update(self.student, moved)
        self.generator_updates += generator_phase  # skipped ones too: nothing here reads the device
        means.note_update(norm, updater)
        return means

    def with_null(self, batch: Batch) -> GuidedText:
        """The prompts and as many null prompts, in the dtype of the frozen teacher."""
        return with_null(batch.text.to(self.null[0].dtype), batch.mask, *self.null)

    def _generator_terms(self, batch: Batch, draws: Draws) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """weight · L_sCM, then weight · L_adv; a term of weight zero is not computed.

        One at a time, so that the backward of the first frees its graph before the second is built.
        """
        size, guided = len(batch.latent), self.with_null(batch)
        batch = batch._replace(text=guided.text[:size], mask=guided.mask[:size])
        with self.memory.of(guided.text, keep=size):
            if self.settings.consistency.weight > 0:
                with self.engine.autocast():
                    loss, seen = self._consistency_loss(batch, draws, guided)
                yield self.settings.consistency.weight * loss, seen
            if self.settings.adversarial.weight > 0:
                with self.engine.autocast():
                    loss = self._adversarial_loss(batch, draws)
                yield self.settings.adversarial.weight * loss, {"loss_adv": loss}

    def _consistency_loss(
        self, batch: Batch, draws: Draws, guided: GuidedText
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings, t = self.settings.consistency, draws.t
        x_t = diffuse(SIGMA_DATA * batch.latent, draws.noise, t)
        with self.clock.part("teacher"), torch.no_grad():
            D = teacher_velocity(self.teacher, x_t, draws, guided)

        def F_theta(x_hat, t):
            return self.student(x_hat, t, batch.text, batch.mask, draws.guidance)

        with self.clock.part("student"):
            F, F_prime = value_and_tangent(F_theta, x_t / SIGMA_DATA, t, *losses.tangent_inputs(t, D))
            logvar = self.student.log_variance(t, draws.guidance)
        r = losses.tangent_warmup(self.generator_updates, settings.tangent_warmup_updates)
        g = losses.consistency_tangent(F.detach(), F_prime, D, x_t, t, r)
        normalised = losses.normalise_tangent(g, settings.tangent_normalisation)
        loss = losses.consistency_loss(F, F.detach(), normalised, logvar, t)
        tangent_norm = torch.linalg.vector_norm(F_prime, dim=(1, 2, 3)).mean()
        return loss, {"loss_scm": loss, "tangent_norm": tangent_norm, "logvar": logvar.mean()}

    def _adversarial_loss(self, batch: Batch, draws: Draws) -> Tensor:
        """The heads see real and generated side by side, so that local batch norm cannot hide the difference."""
        with self.clock.part("features"), torch.no_grad():
            real = renoised_features(self.tapped, SIGMA_DATA * batch.latent, draws, batch)
        with self.clock.part("student"):
            x_0 = one_step_sample(self.student, batch, draws)
        with self.clock.part("features"):
            fake = renoised_features(self.tapped, x_0, draws, batch)
            mixed = [interleave(*kinds) for kinds in zip(real, fake, strict=True)]
            del real, fake
        with self.clock.part("heads"), self.heads.frozen():
            logits = self.heads(mixed).float()
        _, fake_logits = deinterleave(logits, 2)
        return losses.generator_adversarial_loss(fake_logits)

    def _discriminator_terms(self, batch: Batch, draws: Draws) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        batch = batch._replace(text=batch.text.to(self.null[0].dtype))
        with self.memory.of(batch.text), self.engine.autocast():
            loss, seen = self._discriminator_loss(batch, draws)
        yield loss, seen

    def _discriminator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Hinge: real against generated and, if asked for, against data under a neighbour's prompt."""
        with torch.no_grad():
            real = SIGMA_DATA * batch.latent
            with self.clock.part("student"):
                pictures = [real, one_step_sample(self.student, batch, draws)]
            if self.settings.adversarial.misaligned_pairs:
                pictures.append(real.roll(1, dims=0))
            with self.clock.part("features"):
                features = [renoised_features(self.tapped, x_0, draws, batch) for x_0 in pictures]
                mixed = [interleave(*kinds) for kinds in zip(*features, strict=True)]
                del features
        with self.clock.part("heads"):
            logits = self.heads(mixed).float()
        real_logits, *fake_logits = deinterleave(logits, len(pictures))
        loss = losses.discriminator_hinge_loss(real_logits, torch.cat(fake_logits))
        return loss, {"logit_real": real_logits.mean(), "logit_fake": fake_logits[0].mean()}

    def _parts_of_state(self) -> dict:
        """What a checkpoint holds, by name; heads and EMA only where they are on."""
        state = {"student": self.student, "generator": self.generator}
        if self.settings.adversarial.weight > 0:
            state |= {"heads": self.heads, "discriminator": self.discriminator}
        return state | ({"ema": self.ema} if self.ema else {})

    def state_dict(self) -> dict:
        state = {name: part.state_dict() for name, part in self._parts_of_state().items()}
        return state | {"generator_updates": self.generator_updates}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self._parts_of_state().items():
            part.load_state_dict(state[name])
        self.generator_updates = state["generator_updates"]
