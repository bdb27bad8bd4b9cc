"""Samplers. All share one signature: (F, noise, times) -> latent.

F        callable (x_hat [B, C, H, W], t [B]) -> [B, C, H, W], the TrigFlow velocity over σ_d
noise    `Noise`, one stream per picture, so that a picture depends on its own seed and not on its batch
times    TrigFlow times from noise to 0, in radians
latent   unit-scale latents [B, C, H, W], float32
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sprint.base.random import on_device
from sprint.maths.trigflow import SIGMA_DATA, data_estimate, diffuse, noise_estimate

Velocity = Callable[[Tensor, Tensor], Tensor]


class Noise:
    """ε ~ N(0, I), drawn on the CPU from one generator per picture, as diffusers does with a list of them."""

    def __init__(self, seeds: list[int], shape: tuple[int, ...], device: torch.device | str = "cpu"):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def draw(self) -> Tensor:
        """-> [len(seeds), *shape], float32"""
        drawn = torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])
        return on_device(drawn, self.device)


@torch.no_grad()
def sample_consistency(F: Velocity, noise: Noise, times: list[float]) -> Tensor:
    """Few steps of a consistency model: estimate the data, then add fresh noise.  (sCM Algorithm 2)"""
    x_t = noise.draw() * SIGMA_DATA
    for now, later in itertools.pairwise(times):
        t = x_t.new_full((len(x_t),), now)
        x_0 = data_estimate(x_t, F(x_t / SIGMA_DATA, t), t)
        if later == 0:
            break
        x_t = diffuse(x_0, noise.draw(), x_t.new_full((len(x_t),), later))
    return x_0 / SIGMA_DATA


@torch.no_grad()
def sample_ode(F: Velocity, noise: Noise, times: list[float]) -> Tensor:
    """First-order steps along the flow's own ODE: rotate between both estimated ends.  (sCM Eq. 5, DDIM)"""
    x_t = noise.draw() * SIGMA_DATA
    for now, later in itertools.pairwise(times):
        x_t, _ = ode_step(F, x_t, now, later)
    return x_t / SIGMA_DATA


class Trace(NamedTuple):
    """What `sample_ode` passes through, K = len(times) − 1.

    states    [B, K, C, H, W], x_t before each step; the first is pure noise
    velocity  [B, K, C, H, W], D = dx_t/dt = σ_d · F there
    latent    [B, C, H, W], unit scale: where it ends
    """

    states: Tensor
    velocity: Tensor
    latent: Tensor


@torch.no_grad()
def trace_ode(F: Velocity, noise: Noise, times: list[float]) -> Trace:
    """`sample_ode`, which keeps all that it computes."""
    x_t, states, velocity = noise.draw() * SIGMA_DATA, [], []
    for now, later in itertools.pairwise(times):
        states.append(x_t)
        x_t, F_t = ode_step(F, x_t, now, later)
        velocity.append(SIGMA_DATA * F_t)
    return Trace(torch.stack(states, 1), torch.stack(velocity, 1), x_t / SIGMA_DATA)


def ode_step(F: Velocity, x_t: Tensor, now: float, later: float) -> tuple[Tensor, Tensor]:
    """x at time `later` on the circle through both ends that F tells at time `now`.  -> that, and F"""
    t = x_t.new_full((len(x_t),), now)
    F_t = F(x_t / SIGMA_DATA, t)
    x_0, scaled_noise = data_estimate(x_t, F_t, t), noise_estimate(x_t, F_t, t)
    return diffuse(x_0, scaled_noise / SIGMA_DATA, x_t.new_full((len(x_t),), later)), F_t
