"""Stage 1: the flow loss on the adapted teacher, until dense time and QK-norm feel native.

L = ‖v(x_fm, t_fm) − (ε − latent)‖², mean over everything.  (SANA-Sprint §3.2.2)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import ModelMixin
from torch import Tensor

from sprint.base.random import step_generator
from sprint.data.batch import Batch
from sprint.engine.compiled import prepare_blocks
from sprint.engine.engine import Engine
from sprint.maths.losses import mean_square_error
from sprint.maths.schedule import shifted_logit_normal_flow_times
from sprint.maths.trigflow import expand_time
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import FlowVelocity
from sprint.recipe.schema import Recipe
from sprint.train.stage import Stage
from sprint.train.update import Means, Updater
from sprint.weights.load import empty_like


class FlowDraws(NamedTuple):
    """t_fm [B]; noise [B, C, H, W]; dropped [B], True where the caption gives way to the null prompt."""

    t_fm: Tensor
    noise: Tensor
    dropped: Tensor


def draw_flow(
    seed: int, step: int, batch_size: int, latent_shape: tuple, shift: float, dropout: float
) -> FlowDraws:
    """All randomness of one step, for the whole batch."""
    generator = step_generator(seed, "adapt", step)
    return FlowDraws(
        shifted_logit_normal_flow_times(batch_size, shift, generator),
        torch.randn((batch_size, *latent_shape), generator=generator),
        torch.rand(batch_size, generator=generator) < dropout,
    )


def noised(latent: Tensor, draws: FlowDraws) -> Tensor:
    """x_fm = (1 − t_fm) · latent + t_fm · ε"""
    t = expand_time(draws.t_fm, latent)
    return (1 - t) * latent + t * draws.noise


def flow_loss(velocity: Callable, batch: Batch, draws: FlowDraws, null: tuple[Tensor, Tensor]) -> Tensor:
    """velocity: (x_fm, t_fm, text, mask) -> v; null: text [1, N, D] and mask [1, N] of the empty prompt, N at
    least as the batch's.  -> scalar
    """
    null_text, null_mask = (x[:, : batch.mask.shape[1]] for x in null)
    text = torch.where(draws.dropped[:, None, None], null_text, batch.text)
    mask = torch.where(draws.dropped[:, None], null_mask, batch.mask)
    v = velocity(noised(batch.latent, draws), draws.t_fm, text, mask)
    return mean_square_error(v, draws.noise - batch.latent)


class AdaptStage(Stage):
    """State and update of stage 1."""

    name = "adapt"

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        network: ModelMixin,
        null: tuple[Tensor, Tensor],
        time_scale: float = DENSE_TIME,
    ):
        super().__init__(recipe, engine, recipe.adapt)
        self.network, self.null = network.train(), null
        prepare_blocks(network, recipe.compile, recipe.activation_checkpointing)
        trained = engine.wrap(FlowVelocity(network, time_scale), self.settings.optimizer)
        self.updater = Updater(trained, engine, self.steps)

    def phase(self, step: int) -> str:
        return "flow"

    def updaters(self) -> dict[str, Updater]:
        return {"": self.updater}

    def update(self, step: int, batch: Batch) -> Means:
        settings, shape = self.settings, tuple(batch.latent.shape[1:])
        draws = draw_flow(
            self.recipe.seed, step, self.batch_size, shape, settings.shift, settings.caption_dropout
        )
        means, _ = self.descend(self.updater, [self.flow_term], batch, self.my_share(draws))
        return means

    def flow_term(self, batch: Batch, draws: FlowDraws) -> tuple[Tensor, dict[str, Tensor]]:
        with self.clock.part("forward"):
            return flow_loss(self.updater.trained, batch, draws, self.null), {}

    def result(self) -> ModelMixin | None:
        """The adapted network on the CPU, on the main process. Collective."""
        trained = self.rebuilt(
            self.updater,
            self.updater.trained.local(),
            lambda: FlowVelocity(empty_like(self.network)),
        )
        return trained and trained.view.network
