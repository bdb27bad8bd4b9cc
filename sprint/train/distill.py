"""Stage 2: sCM + LADD, and distribution matching. What is trained takes turns on successive batches.

Source: SANA-Sprint (arXiv 2503.09641, Algorithm 1), and the public trainer's settings. Ours is the self-consistency
term: from the one-step sample that LADD judges and the same noise, a second step shall lead to that sample again.
The student F_θ, the frozen adapted teacher F_T (guided, or its features for LADD), the heads, the fake score.
What is drawn is in `sprint.train.draws`, the losses in `sprint.train.terms`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from torch import Tensor

from sprint.base.random import step_generator
from sprint.data.batch import Batch, Traced
from sprint.engine.compiled import prepare_blocks
from sprint.engine.ema import Ema
from sprint.engine.engine import Engine
from sprint.engine.held import Read, Tensors
from sprint.maths import losses
from sprint.maths.schedule import lognormal_trig_times
from sprint.models.depth import grown
from sprint.models.discriminator import DiscriminatorHeads
from sprint.models.guidance import GuidedText, with_null, with_null_under_prompts_mask
from sprint.models.student import Student, TrainedStudent, from_adapted
from sprint.models.taps import TappedTeacher
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from sprint.recipe.schema import NullMask, Recipe
from sprint.recipe.shares import check_shares
from sprint.train.checks import needs_teacher
from sprint.train.draws import Draws, draw
from sprint.train.matching import start_fake_score
from sprint.train.stage import Stage, Term
from sprint.train.states import spread
from sprint.train.terms import Logged
from sprint.train.terms.adversarial import discriminator_term, sample_term
from sprint.train.terms.consistency import (
    Pass,
    Point,
    consistency_term,
    dual_pass,
    stored_point,
    teacher_point,
)
from sprint.train.terms.matching import fake_score_term, matching_term
from sprint.train.terms.regression import end_point_distance, regression_term
from sprint.train.terms.sample import self_consistency_term
from sprint.train.turns import DISCRIMINATOR, FAKE_SCORE, GENERATOR, cycle, turn
from sprint.train.update import Means, Updater, prefixed
from sprint.weights.load import empty_like

WITH_NULL = {NullMask.own: with_null, NullMask.prompts: with_null_under_prompts_mask}


class DistillStage(Stage):
    """State and updates of stage 2; whose turn it is, `sprint.train.turns` says."""

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
        super().__init__(recipe, engine, recipe.distill)
        check_shares(recipe, engine.processes)
        torch.manual_seed(recipe.seed)
        network = grown(from_adapted(adapted), recipe.distill.depth).to(engine.device)
        self.student = Student(network, time_scale).train().to(engine.device)
        self._start_log_variance(math.prod(latent_shape))
        turns = [self.phase(step) for step in range(self.steps)]
        if self.matching:
            fake_score = start_fake_score(recipe, engine, adapted, time_scale)
            self.fake_score = Updater(fake_score, engine, turns.count(FAKE_SCORE))
        for each in (network, adapted) if needs_teacher(recipe.distill) else (network,):
            prepare_blocks(each, recipe.compile, recipe.activation_checkpointing)
        if needs_teacher(recipe.distill):
            self.teacher = TrigFlowView(engine.frozen(adapted), time_scale)
            self.memory = self.teacher.teacher.text_memory(adapted)
            self.null = (null[0].to(adapted.dtype), null[1])
        trained = engine.wrap(TrainedStudent(self.student), self.settings.optimizer)
        self.generator = Updater(trained, engine, turns.count(GENERATOR))
        if self.adversarial:
            taps = self.settings.adversarial.taps
            self.heads = DiscriminatorHeads(self.teacher.sizes.width, len(taps)).train()
            self.tapped = TappedTeacher(self.teacher, taps)
            trained = engine.replicated(self.heads, self.settings.adversarial.optimizer)
            self.discriminator = Updater(trained, engine, turns.count(DISCRIMINATOR))
        decay = self.settings.ema_decay
        self.ema = Ema(self.generator.trained.local(), decay) if decay else None
        self.generator_updates = 0

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
    def adversarial(self) -> bool:
        """Whether there is a discriminator."""
        return self.settings.adversarial.weight > 0

    @property
    def matching(self) -> bool:
        """Whether there is a fake score."""
        return self.settings.matching.weight > 0

    # ---- Algorithm 1 ------------------------------------------------------------------------------------

    @property
    def kinds(self) -> int:
        return len(cycle(self.settings))

    def phase(self, step: int) -> str:
        return turn(step, self.settings)

    @property
    def traced(self) -> bool:
        return self.settings.trajectories.states > 0

    @property
    def reads(self) -> int:
        return self.batch_size // (self.settings.trajectories.states or 1)

    def update(self, step: int, batch: Batch | Traced) -> Means:
        draws = self.my_share(draw(self.recipe, step, tuple(batch.latent.shape[1:])))
        if self.settings.trajectories.states:
            batch = spread(self.recipe, step, batch, self.engine.share(self.reads))
            draws = draws._replace(guidance=batch.trajectory.guidance)
        updates = {
            GENERATOR: self._update_student,
            DISCRIMINATOR: self._update_heads,
            FAKE_SCORE: self._update_fake_score,
        }
        return updates[self.phase(step)](batch, draws)

    def _update_student(self, batch: Batch, draws: Draws) -> Means:
        prepared = self._guided if needs_teacher(self.settings) else self._untaught
        means, moved = self.descend(self.generator, self.student_terms(), batch, draws, prepared)
        if self.ema:
            with self.clock.part("optimizer"):
                self.ema.update(self.generator.trained.local(), moved)
        self.generator_updates += 1  # skipped ones too: nothing here reads the device
        return means

    def student_terms(self) -> list[Term]:
        """(batch, guided, draws) -> loss, what to log. A term of weight zero is not computed."""
        terms: list[Term] = []
        if self.settings.consistency.weight > 0:
            terms = [self.stored_term if self.settings.trajectories.states else self.consistency_term]
        elif self.settings.regression > 0:
            terms = [self.regression_term]
        terms += [self.matching_term] if self.matching else []
        return terms + (self.terms_of_samples() if self.adversarial else [])

    def terms_of_samples(self) -> list[Term]:
        """LADD, once its heads are warm, with self-consistency; until then that alone, if it is on."""
        if self.generator_updates >= self.settings.adversarial.warmup_steps:
            return [self.sample_term]
        return [self.self_consistency_term] if self.settings.self_consistency > 0 else []

    def consistency_term(self, batch: Batch, guided: GuidedText, draws: Draws) -> tuple[Tensor, Logged]:
        point = teacher_point(self.teacher, batch, draws, guided, self.clock)
        said = dual_pass(self.generator.trained, point, batch, draws.guidance, self.clock)
        return self._consistency(said, point)

    def stored_term(self, batch: Traced, guided: GuidedText | None, draws: Draws) -> tuple[Tensor, Logged]:
        """sCM on what a trajectory stores, and regression onto its end from the same pass."""
        point = stored_point(batch)
        said = dual_pass(self.generator.trained, point, batch, draws.guidance, self.clock)
        loss, seen = self._consistency(said, point)
        if self.settings.regression == 0:
            return loss, seen
        distance, far = end_point_distance(said.F, point, batch)
        return loss + self.settings.regression * distance, seen | far

    def _consistency(self, said: Pass, point: Point) -> tuple[Tensor, Logged]:
        settings = self.settings.consistency
        r = losses.tangent_warmup(self.generator_updates, settings.tangent_warmup_updates)
        loss, seen = consistency_term(said, point, r, settings)
        return settings.weight * loss, seen

    def regression_term(
        self, batch: Traced, guided: GuidedText | None, draws: Draws
    ) -> tuple[Tensor, Logged]:
        loss, seen = regression_term(self.generator.trained, batch, self.clock)
        return self.settings.regression * loss, seen

    def sample_term(self, batch: Batch, guided: GuidedText, draws: Draws) -> tuple[Tensor, Logged]:
        with self.heads.frozen():
            return sample_term(
                self.generator.trained, self.tapped, self.heads, batch, draws, self.settings, self.clock
            )

    def self_consistency_term(self, batch: Batch, guided: GuidedText, draws: Draws) -> tuple[Tensor, Logged]:
        loss, seen = self_consistency_term(self.generator.trained, batch, draws, self.clock)
        return self.settings.self_consistency * loss, seen

    def matching_term(self, batch: Batch, guided: GuidedText, draws: Draws) -> tuple[Tensor, Logged]:
        student, fake_score = self.generator.trained, self.fake_score.trained
        loss, seen = matching_term(student, self.teacher, fake_score, batch, draws, guided, self.clock)
        return self.settings.matching.weight * loss, seen

    def _update_heads(self, batch: Batch, draws: Draws) -> Means:
        means, _ = self.descend(self.discriminator, [self.heads_term], batch, draws, self._for_heads)
        return means

    def heads_term(self, batch: Batch, draws: Draws) -> tuple[Tensor, Logged]:
        student, heads = self.generator.trained, self.discriminator.trained
        with self.memory.of(batch.text):
            return discriminator_term(
                student, self.tapped, heads, batch, draws, self.settings.adversarial, self.clock
            )

    def _update_fake_score(self, batch: Batch, draws: Draws) -> Means:
        means, _ = self.descend(self.fake_score, [self.fake_score_term], batch, draws)
        return means

    def fake_score_term(self, batch: Batch, draws: Draws) -> tuple[Tensor, Logged]:
        student, fake_score = self.generator.trained, self.fake_score.trained
        return fake_score_term(student, fake_score, batch, draws, self.clock)

    # ---- what the teacher reads -------------------------------------------------------------------------

    def with_null(self, batch: Batch) -> GuidedText:
        """The prompts and as many null prompts, in the dtype of the frozen teacher."""
        beside = WITH_NULL[self.settings.null_mask]
        return beside(batch.text.to(self.null[0].dtype), batch.mask, *self.null)

    @contextmanager
    def _guided(self, batch: Batch, first: bool) -> Iterator[tuple[Batch, GuidedText]]:
        """The batch, and its prompts with null prompts. Inside, backward passes too, the teacher reads each once."""
        size, guided = len(batch.latent), self.with_null(batch)
        with self.memory.of(guided.text, keep=size):
            yield batch._replace(text=guided.text[:size], mask=guided.mask[:size]), guided

    @contextmanager
    def _untaught(self, batch: Batch, first: bool) -> Iterator[tuple[Batch, None]]:
        """The batch, where no term asks the teacher."""
        yield batch, None

    @contextmanager
    def _for_heads(self, batch: Batch, first: bool) -> Iterator[tuple[Batch]]:
        """The batch. Power iteration of the spectral norms runs once an update, not once a part."""
        self.heads.train(first)
        yield (batch._replace(text=batch.text.to(self.null[0].dtype)),)

    # ---- what comes of it -------------------------------------------------------------------------------

    def result(self) -> Student | None:
        """The student on the CPU, on the main process; averaged weights if there are any. Collective."""
        held = self.ema.shadow if self.ema else self.generator.trained.local()
        trained = self.rebuilt(
            self.generator,
            held,
            lambda: TrainedStudent(Student(empty_like(self.student.network))),
        )
        return trained and trained.student

    def updaters(self) -> dict[str, Updater]:
        heads = {"heads": self.discriminator} if self.adversarial else {}
        fake_score = {"fake": self.fake_score} if self.matching else {}
        return {"student": self.generator} | heads | fake_score

    def tensors(self) -> Tensors:
        average = self.generator.trained.saved(self.ema.shadow) if self.ema else {}
        return super().tensors() | prefixed("ema", average)

    def facts(self) -> dict:
        return super().facts() | {"generator_updates": self.generator_updates}

    def load(self, read: Read, facts: dict) -> None:
        super().load(read, facts)
        if self.ema:
            self.generator.trained.load_into(self.ema.shadow, read, "ema")
        self.generator_updates = facts["generator_updates"]
