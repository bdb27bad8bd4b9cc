"""Stage 2: sCM + LADD. Generator and discriminator take turns on successive batches.

Source: SANA-Sprint (arXiv 2503.09641, Algorithm 1), and the public trainer's settings. Ours is the self-consistency
term: from the one-step sample that LADD judges and the same noise, a second step shall lead to that sample again.
The student F_θ, the frozen adapted teacher F_T (with guidance for sCM, its features for LADD), the heads.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers import ModelMixin
from torch import Tensor

from sprint.base.clock import Clock
from sprint.base.random import step_generator
from sprint.data.batch import Batch, parts
from sprint.engine.batches import take, to_device
from sprint.engine.compiled import prepare_blocks
from sprint.engine.ema import Ema
from sprint.engine.engine import Engine
from sprint.engine.held import Read, Tensors
from sprint.maths import losses
from sprint.maths.dual import value_and_tangent
from sprint.maths.schedule import lognormal_trig_times, with_max_time
from sprint.maths.trigflow import SIGMA_DATA, data_estimate, diffuse, noise_estimate
from sprint.models.discriminator import DiscriminatorHeads, deinterleave, interleave, swapped
from sprint.models.guidance import GuidedText, guided_velocity, with_null
from sprint.models.student import Student, TrainedStudent, from_adapted
from sprint.models.taps import TappedTeacher
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from sprint.recipe.schema import Distill, Recipe
from sprint.train.checks import check_share
from sprint.train.update import Means, Updater, prefixed, under
from sprint.weights.load import empty_like

GENERATOR, DISCRIMINATOR = "G", "D"
SECOND_STEP = (0.3, 0.7)  # where it starts, as a share of the time of the first


class Draws(NamedTuple):
    """All randomness of one update; every tensor has the batch first.

    guidance                  [B], the scale the student is told
    t, noise                  where sCM looks (generator only)
    start_t, start_noise      where the student starts its one-step sample, π/2 for some
    renoise_t, renoise_noise  where the discriminator looks at it
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
    shape = (batch, *latent_shape)

    def times(density):
        return lognormal_trig_times(batch, density.mean, density.std, generator)

    draws = Draws(
        guidance=scales[torch.randint(len(scales), (batch,), generator=generator)],
        t=times(settings.consistency.time),
        noise=torch.randn(shape, generator=generator),
        start_t=with_max_time(times(settings.consistency.time), adversarial.max_time_probability, generator),
        start_noise=torch.randn(shape, generator=generator),
        renoise_t=times(adversarial.time),
        renoise_noise=torch.randn(shape, generator=generator),
        second_t=torch.rand(batch, generator=generator),
    )
    low, high = SECOND_STEP
    return draws._replace(second_t=draws.start_t * (low + (high - low) * draws.second_t))


def teacher_velocity(teacher: TrigFlowView, x_t: Tensor, draws: Draws, guided: GuidedText) -> Tensor:
    """D = σ_d · (F_u + w (F_c − F_u)) = dx_t/dt along the guided teacher's flow."""
    return SIGMA_DATA * guided_velocity(teacher, x_t / SIGMA_DATA, draws.t, guided, draws.guidance)


class Sample(NamedTuple):
    """x̂_0 = f_θ(x_t, t) in one step from x_t, the network's output F on the way, and its log-variance [B]."""

    x_0: Tensor
    x_t: Tensor
    F: Tensor
    logvar: Tensor


def one_step_sample(student: Callable, batch: Batch, draws: Draws) -> Sample:
    """From the noised data at t = start_t, or from pure noise where that is π/2."""
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
        adapted: ModelMixin,
        null: tuple[Tensor, Tensor],
        latent_shape: tuple[int, int, int],
        time_scale: float = DENSE_TIME,
    ):
        self.recipe, self.engine = recipe, engine
        self.settings: Distill = recipe.distill
        check_share(recipe, engine)
        torch.manual_seed(recipe.seed)
        network = from_adapted(adapted).to(engine.device)
        self.student = Student(network, time_scale).train().to(engine.device)
        self._start_log_variance(math.prod(latent_shape))
        for each in (network, adapted):
            prepare_blocks(each, recipe.compile, recipe.activation_checkpointing)
        self.teacher = TrigFlowView(engine.frozen(adapted), time_scale)
        self.memory = self.teacher.teacher.text_memory(adapted)
        self.null = (null[0].to(adapted.dtype), null[1])
        taken = [self.phase(step) for step in range(self.steps)]
        trained = engine.wrap(TrainedStudent(self.student), self.settings.optimizer)
        self.generator = Updater(trained, engine, taken.count(GENERATOR))
        if self.settings.adversarial.weight > 0:
            taps = self.settings.adversarial.taps
            self.heads = DiscriminatorHeads(self.teacher.sizes.width, len(taps)).train()
            self.tapped = TappedTeacher(self.teacher, taps)
            trained = engine.replicated(self.heads, self.settings.adversarial.optimizer)
            self.discriminator = Updater(trained, engine, taken.count(DISCRIMINATOR))
        decay = self.settings.ema_decay
        self.ema = Ema(self.generator.trained.local(), decay) if decay else None
        self.generator_updates = 0
        self.clock = Clock(engine.device)

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
        updater = self.generator if generator_phase else self.discriminator
        terms, means, size = self._terms(generator_phase), Means(), len(batch.latent)
        updater.trained.zero_grad()
        for part in parts(size, self.recipe.micro_batch_size):
            share = (part.stop - part.start) / size
            if not generator_phase:
                self.heads.train(part.start == 0)  # their spectral norms move on once an update
            with self._reading(take(batch, part), generator_phase) as (given, guided):
                for term in terms:
                    more = part.stop < size or term is not terms[-1]
                    with updater.trained.accumulating(more):
                        loss, seen = term(given, take(draws, part), guided)
                        with self.clock.part("backward"):
                            updater.trained.backward(share * loss)
                    means.add(share, loss=loss, **seen)
        with self.clock.part("optimizer"):
            norm, moved = updater.step()
            if generator_phase and self.ema:
                self.ema.update(updater.trained.local(), moved)
        self.generator_updates += generator_phase  # skipped ones too: nothing here reads the device
        means.note_update(norm, updater)
        return means

    def with_null(self, batch: Batch) -> GuidedText:
        """The prompts and as many null prompts, in the dtype of the frozen teacher."""
        return with_null(batch.text.to(self.null[0].dtype), batch.mask, *self.null)

    @contextmanager
    def _reading(self, batch: Batch, generator_phase: bool) -> Iterator[tuple[Batch, GuidedText | None]]:
        """The batch, and beside it the prompts with null prompts where guidance is wanted.

        Inside, the teacher reads every text of the generator's phase once, its backward passes included.
        """
        size = len(batch.latent)
        if not generator_phase:
            yield batch._replace(text=batch.text.to(self.null[0].dtype)), None
            return
        guided = self.with_null(batch)
        with self.memory.of(guided.text, keep=size):
            yield batch._replace(text=guided.text[:size], mask=guided.mask[:size]), guided

    def _terms(self, generator_phase: bool) -> list[Callable]:
        """What is added up in this phase, (batch, draws, guided) -> loss, what to log.

        One at a time, so that the backward of the first frees its graph before the second is built. A term of
        weight zero is not computed.
        """
        if not generator_phase:
            return [self._discriminator_term]
        terms = [self._consistency_term] if self.settings.consistency.weight > 0 else []
        return terms + ([self._sample_term] if self.settings.adversarial.weight > 0 else [])

    def _consistency_term(self, batch: Batch, draws: Draws, guided: GuidedText):
        with self.engine.autocast():
            loss, seen = self._consistency_loss(batch, draws, guided)
        return self.settings.consistency.weight * loss, seen

    def _sample_term(self, batch: Batch, draws: Draws, guided: GuidedText):
        """LADD's loss of a one-step sample and, if asked for, its distance from what a second step makes of it."""
        settings = self.settings
        with self.engine.autocast():
            with self.clock.part("student"):
                sample = one_step_sample(self.generator.trained, batch, draws)
                target = None
                if settings.self_consistency > 0:
                    target = second_step(self.generator.trained, sample, batch, draws)
            adversarial = self._adversarial_loss(batch, draws, sample.x_0)
        # a gradient for every weight, be it zero: DDP averages when the last of them is there
        loss = settings.adversarial.weight * adversarial + 0.0 * sample.logvar.sum()
        if target is None:
            return loss, {"loss_adv": adversarial}
        distance = losses.self_consistency_loss(sample.x_0, target)
        return loss + settings.self_consistency * distance, {"loss_adv": adversarial, "loss_self": distance}

    def _discriminator_term(self, batch: Batch, draws: Draws, guided: None):
        with self.memory.of(batch.text), self.engine.autocast():
            return self._discriminator_loss(batch, draws)

    def _consistency_loss(
        self, batch: Batch, draws: Draws, guided: GuidedText
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings, t = self.settings.consistency, draws.t
        x_t = diffuse(SIGMA_DATA * batch.latent, draws.noise, t)
        with self.clock.part("teacher"), torch.no_grad():
            D = teacher_velocity(self.teacher, x_t, draws, guided)

        logvar = None

        def F_theta(x_hat, t):
            nonlocal logvar
            F, logvar = self.generator.trained(x_hat, t, batch.text, batch.mask, draws.guidance)
            return F

        with self.clock.part("student"):
            F, F_prime = value_and_tangent(F_theta, x_t / SIGMA_DATA, t, *losses.tangent_inputs(t, D))
        r = losses.tangent_warmup(self.generator_updates, settings.tangent_warmup_updates)
        g = losses.consistency_tangent(F.detach(), F_prime, D, x_t, t, r)
        if settings.normalise_tangent:
            g = losses.normalise_tangent(g, settings.tangent_normalisation)
        loss = losses.consistency_loss(F, F.detach(), g, logvar, t)
        tangent_norm = torch.linalg.vector_norm(F_prime, dim=(1, 2, 3)).mean()
        return loss, {"loss_scm": loss, "tangent_norm": tangent_norm, "logvar": logvar.mean()}

    def _adversarial_loss(self, batch: Batch, draws: Draws, x_0: Tensor) -> Tensor:
        """The heads see real and generated side by side, so that local batch norm cannot hide the difference."""
        with self.clock.part("features"), torch.no_grad():
            real = renoised_features(self.tapped, SIGMA_DATA * batch.latent, draws, batch)
        with self.clock.part("features"):
            fake = renoised_features(self.tapped, x_0, draws, batch)
            mixed = [interleave(*kinds) for kinds in zip(real, fake, strict=True)]
            del real, fake
        with self.clock.part("heads"), self.heads.frozen():
            logits = self.heads(mixed, 2 * self.settings.adversarial.neighbours).float()
        _, fake_logits = deinterleave(logits, 2)
        return losses.generator_adversarial_loss(fake_logits)

    def _discriminator_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Hinge: real against generated and, if asked for, against data under a neighbour's prompt."""
        neighbours = self.settings.adversarial.neighbours
        with torch.no_grad():
            real = SIGMA_DATA * batch.latent
            with self.clock.part("student"):
                pictures = [real, one_step_sample(self.generator.trained, batch, draws).x_0]
            if self.settings.adversarial.misaligned_pairs:
                pictures.append(swapped(real, neighbours))
            with self.clock.part("features"):
                features = [renoised_features(self.tapped, x_0, draws, batch) for x_0 in pictures]
                mixed = [interleave(*kinds) for kinds in zip(*features, strict=True)]
                del features
        with self.clock.part("heads"):
            logits = self.discriminator.trained(mixed, len(pictures) * neighbours).float()
        real_logits, *fake_logits = deinterleave(logits, len(pictures))
        loss = losses.discriminator_hinge_loss(real_logits, torch.cat(fake_logits))
        return loss, {"logit_real": real_logits.mean(), "logit_fake": fake_logits[0].mean()}

    def result(self) -> Student | None:
        """The student on the CPU, on the main process; averaged weights if there are any. Collective."""
        trained = self.generator.trained
        weights = trained.full(self.ema.shadow if self.ema else trained.local())
        if not self.engine.main_process:
            return None
        result = TrainedStudent(Student(empty_like(self.student.network)))
        result.load_state_dict(weights, assign=True)
        return result.student.eval()

    def updaters(self) -> list[Updater]:
        return list(self._updaters().values())

    def _updaters(self) -> dict[str, Updater]:
        heads = {"heads": self.discriminator} if self.settings.adversarial.weight > 0 else {}
        return {"student": self.generator, **heads}

    def tensors(self) -> Tensors:
        tensors = {}
        for name, updater in self._updaters().items():
            tensors |= prefixed(name, updater.tensors())
        if self.ema:
            tensors |= prefixed("ema", self.generator.trained.saved(self.ema.shadow))
        return tensors

    def facts(self) -> dict:
        places = {name: updater.facts() for name, updater in self._updaters().items()}
        return places | {"generator_updates": self.generator_updates}

    def load(self, read: Read, facts: dict) -> None:
        for name, updater in self._updaters().items():
            updater.load(under(name, read), facts[name])
        if self.ema:
            self.generator.trained.load_into(self.ema.shadow, read, "ema")
        self.generator_updates = facts["generator_updates"]
