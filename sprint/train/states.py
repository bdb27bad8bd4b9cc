"""Which states of its trajectories an update learns from, each as a sample of its own."""

import torch
from torch import Tensor

from sprint.base.random import on_device, step_generator
from sprint.data.batch import Batch, Traced, Trajectory
from sprint.engine.batches import each
from sprint.recipe.schema import Recipe
from sprint.recipe.shares import groups_of


def choose(recipe: Recipe, step: int, there: int) -> Tensor:
    """States of every trajectory of a whole batch, from (seed, step) alone; none of them twice.

    there   how many a trajectory has. The first, pure noise, is among them with its probability, in any place.

    -> [trajectories, distill.trajectories.states], falling in time
    """
    settings = recipe.distill.trajectories
    count = recipe.distill.batch_size // settings.states
    generator = step_generator(recipe.seed, "states", step)
    lots = torch.rand(count, there, generator=generator)
    noise = torch.rand(count, generator=generator) < settings.max_time_probability
    lots[:, 0] = torch.where(noise, -1.0, 2.0)
    return lots.argsort(dim=1)[:, : settings.states].sort(dim=1).values


def at_states(batch: Traced, chosen: Tensor, group: int) -> Traced:
    """Every chosen state as a sample: of B trajectories, and K states of each, B·K samples with one state each.

    chosen   [B, K]
    group    divides B. So many trajectories stand side by side in each of their states, before the next so many do:
             a cut between groups parts no neighbours, and leaves all draws of a batch where they are.
    """
    count, states = chosen.shape
    which = torch.arange(count).view(-1, 1, group).expand(-1, states, -1).flatten()
    state = chosen.view(-1, group, states).transpose(1, 2).flatten()
    device = batch.latent.device
    which, state = on_device(which, device), on_device(state, device)
    path = batch.trajectory
    samples = each(Batch(batch.latent, batch.text, batch.mask), lambda tensor: tensor[which])
    along = (tensor[which, state][:, None] for tensor in (path.states, path.velocity, path.t))
    return Traced(*samples, Trajectory(*along, path.guidance[which]))


def spread(recipe: Recipe, step: int, batch: Traced, mine: range) -> Traced:
    """This process's trajectories, which are `mine` of the whole batch's, as samples."""
    chosen = choose(recipe, step, batch.trajectory.t.shape[1])[mine.start : mine.stop]
    return at_states(batch, chosen, groups_of(recipe.distill))
