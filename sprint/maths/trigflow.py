"""TrigFlow and flow matching: two clocks for one process. Equations only, no modules.

Sources: SANA-Sprint (arXiv 2503.09641, §3.1 and Eq. 4-6), sCM (arXiv 2410.11081, Eq. 1-6).
Every function is exact in the dtype it is given; times are float32 or float64, never half precision.

Symbols
    t        TrigFlow time in radians, 0 (data) to π/2 (noise)
    t_fm     flow-matching time, 0 (data) to 1 (noise)
    x_0      σ_d · latent;  ε ~ N(0, I)
    x_t      cos t · x_0 + sin t · σ_d · ε
    x_hat    x_t / σ_d, what the network sees (unit-scale latents)
    x_fm     (1 − t_fm) · latent + t_fm · ε
    v        ε − latent, the flow-matching velocity
    F        cos t · ε − sin t · latent, the TrigFlow velocity over σ_d: dx_t/dt = σ_d · F

Times are [B] or scalars; `expand_time` gives them the trailing axes of the pictures.
"""

import math

import torch
from torch import Tensor

SIGMA_DATA = 0.5
HALF_PI = math.pi / 2


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], with as many axes as `like`; half precision is an error, since it quantises time."""
    if t.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(f"time must be float32 or float64, not {t.dtype}")
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


# ---- the path -------------------------------------------------------------------------------------


def diffuse(x_0: Tensor, noise: Tensor, t: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """x_t = cos t · x_0 + sin t · σ_d · ε.  (sCM Eq. 1)"""
    t = expand_time(t, x_0)
    return torch.cos(t) * x_0 + torch.sin(t) * sigma_data * noise


def ideal_velocity(latent: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """F = cos t · ε − sin t · latent: what the network would say if it knew both ends."""
    t = expand_time(t, latent)
    return torch.cos(t) * noise - torch.sin(t) * latent


def data_estimate(x_t: Tensor, F: Tensor, t: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """f(x_t, t) = cos t · x_t − sin t · σ_d · F.  (sCM Eq. 6; the consistency function)"""
    t = expand_time(t, x_t)
    return torch.cos(t) * x_t - torch.sin(t) * sigma_data * F


def noise_estimate(x_t: Tensor, F: Tensor, t: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """σ_d · ε = sin t · x_t + cos t · σ_d · F: the other end of the same circle."""
    t = expand_time(t, x_t)
    return torch.sin(t) * x_t + torch.cos(t) * sigma_data * F


def velocity_from_data(x_t: Tensor, x_0: Tensor, t: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """The F whose data estimate is `x_0`; the inverse of `data_estimate`, for t > 0."""
    t = expand_time(t, x_t)
    return (torch.cos(t) * x_t - x_0) / (torch.sin(t) * sigma_data)


# ---- the clocks -----------------------------------------------------------------------------------


def flow_time(t: Tensor) -> Tensor:
    """t_fm = sin t / (sin t + cos t).  (SANA-Sprint Eq. 4)"""
    s, c = torch.sin(t), torch.cos(t)
    return s / (s + c)


def trig_time(t_fm: Tensor) -> Tensor:
    """t = atan(t_fm / (1 − t_fm)), written so that t_fm = 1 gives π/2."""
    return torch.atan2(t_fm, 1 - t_fm)


def flow_scale(t_fm: Tensor) -> Tensor:
    """k = √(t_fm² + (1 − t_fm)²) = 1/(sin t + cos t): the radius of the flow path.  x_fm = k · x_hat."""
    return torch.sqrt(t_fm**2 + (1 - t_fm) ** 2)


# ---- the two velocities ---------------------------------------------------------------------------


def to_flow_input(x_hat: Tensor, t_fm: Tensor) -> Tensor:
    """x_fm = k · x_hat.  (SANA-Sprint Eq. 5)"""
    return expand_time(flow_scale(t_fm), x_hat) * x_hat


def from_flow_input(x_fm: Tensor, t_fm: Tensor) -> Tensor:
    """x_hat = x_fm / k."""
    return x_fm / expand_time(flow_scale(t_fm), x_fm)


def to_trig_velocity(v: Tensor, x_fm: Tensor, t_fm: Tensor) -> Tensor:
    """F = [(1 − 2 t_fm) · x_fm + (1 − 2 t_fm + 2 t_fm²) · v] / k.  (SANA-Sprint Eq. 6)"""
    k = expand_time(flow_scale(t_fm), v)
    t_fm = expand_time(t_fm, v)
    return ((1 - 2 * t_fm) * x_fm + (1 - 2 * t_fm + 2 * t_fm**2) * v) / k


def to_flow_velocity(F: Tensor, x_fm: Tensor, t_fm: Tensor) -> Tensor:
    """v = [k · F − (1 − 2 t_fm) · x_fm] / k², the inverse of `to_trig_velocity`; k² is never below 1/2."""
    k = expand_time(flow_scale(t_fm), F)
    t_fm = expand_time(t_fm, F)
    return (k * F - (1 - 2 * t_fm) * x_fm) / k**2


# ---- a case with a known answer ---------------------------------------------------------------------


def gaussian_consistency(x_t: Tensor, t: Tensor, a: float, sigma_data: float = SIGMA_DATA) -> Tensor:
    """f(x_t, t) = a · x_t / √(a² cos² t + σ_d² sin² t), exact for data N(0, a²) along the flow's own ODE."""
    t = expand_time(t, x_t)
    return a * x_t / torch.sqrt((a * torch.cos(t)) ** 2 + (sigma_data * torch.sin(t)) ** 2)


def gaussian_velocity(x_t: Tensor, t: Tensor, a: float, sigma_data: float = SIGMA_DATA) -> Tensor:
    """F(x_t, t) for data N(0, a²): E[cos t · ε − sin t · latent | x_t] with x_0 = σ_d · latent."""
    t = expand_time(t, x_t)
    c, s = torch.cos(t), torch.sin(t)
    return (sigma_data**2 - a**2) * s * c * x_t / (sigma_data * ((a * c) ** 2 + (sigma_data * s) ** 2))
