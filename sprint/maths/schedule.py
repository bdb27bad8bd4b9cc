"""Where time is spent: densities to train with, lists to sample with.

Every density draws float32 or float64 times [B] from a generator of its own.
"""

import itertools
import math

import torch
from torch import Tensor

from sprint.base.errors import SprintError
from sprint.maths.trigflow import HALF_PI, SIGMA_DATA, trig_time

MAX_TIME = 1.57080  # diffusers' default start, π/2 to five places
TWO_STEP_MIDDLE = 1.3  # SANA-Sprint Table 7

# ---- training ---------------------------------------------------------------------------------------


def lognormal_trig_times(
    batch: int, mean: float, std: float, generator: torch.Generator, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """t = atan(exp(N(mean, std²)) / σ_d).  (SANA-Sprint §3.2, sCM Eq. 9)"""
    z = torch.randn(batch, generator=generator, device=generator.device)
    return torch.atan(torch.exp(z * std + mean) / sigma_data)


def with_max_time(t: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Each time becomes π/2 with `probability`: max-time weighting.  (SANA-Sprint Eq. 12)"""
    chosen = torch.rand(t.shape, generator=generator, device=t.device) < probability
    return torch.where(chosen, torch.full_like(t, HALF_PI), t)


def shifted_logit_normal_flow_times(batch: int, shift: float, generator: torch.Generator) -> Tensor:
    """t_fm = a·σ / (1 + (a − 1)·σ) with σ = sigmoid(N(0, 1)): stage 1 and flow-matching teachers."""
    z = torch.randn(batch, generator=generator, device=generator.device)
    return shift_flow_time(torch.sigmoid(z), shift)


def shift_flow_time(sigma: Tensor, shift: float) -> Tensor:
    """σ' = a·σ / (1 + (a − 1)·σ); a > 1 leans towards noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


# ---- sampling ---------------------------------------------------------------------------------------


def student_times(num_inference_steps: int) -> list[float]:
    """Default TrigFlow times of a student, from noise to 0: the same as diffusers' defaults.

    1: [π/2, 0]; 2: [π/2, 1.3, 0]; more: evenly spaced.  (SANA-Sprint §3.4)
    """
    if num_inference_steps < 1:
        raise SprintError(f"steps must be at least 1, not {num_inference_steps}")
    if num_inference_steps == 2:
        return [MAX_TIME, TWO_STEP_MIDDLE, 0.0]
    return torch.linspace(MAX_TIME, 0, num_inference_steps + 1).tolist()


def teacher_times(num_inference_steps: int, shift: float = 3.0) -> list[float]:
    """TrigFlow times of a teacher: flow times evenly spaced, then shifted, as Sana's sampler does."""
    if num_inference_steps < 1:
        raise SprintError(f"steps must be at least 1, not {num_inference_steps}")
    t_fm = shift_flow_time(torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64), shift)
    return trig_time(t_fm).tolist()


def check_times(times: list[float]) -> list[float]:
    """Custom lists must fall strictly from at most π/2 to 0.

    Raises: SprintError naming what is wrong.
    """
    falling = all(a > b for a, b in itertools.pairwise(times))
    if len(times) < 2 or not all(map(math.isfinite, times)) or not falling or times[-1] != 0:
        raise SprintError(f"times must fall strictly and end at 0, not {times}")
    if times[0] > HALF_PI + 1e-4:
        raise SprintError(f"times start at most at π/2 = 1.5708, not {times[0]}")
    return times
