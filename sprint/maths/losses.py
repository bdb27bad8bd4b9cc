"""The losses of SANA-Sprint, and others to choose, as pure functions of tensors. float32 or float64 in and out.

Sources: SANA-Sprint (arXiv 2503.09641, Algorithm 1 and §3.2-3.3), sCM (arXiv 2410.11081, Eq. 8 and §4); what is not
in these says its own.
Symbols as in `sprint.maths.trigflow`; F⁻ is F without gradient, F' its total time derivative times cos t · sin t,
D = σ_d · F_teacher the teacher's dx_t/dt (guided), w_φ(t) = logvar.
"""

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from sprint.maths.trigflow import SIGMA_DATA, expand_time

PURE_NOISE = 1e-6  # cos t at most: t is π/2 but for rounding in float32


def mean_square_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Unweighted, over everything: flow matching, stage 1.  -> scalar"""
    return (prediction - target).square().mean()


# ---- sCM ------------------------------------------------------------------------------------------


def tangent_inputs(t: Tensor, D: Tensor, sigma_data: float = SIGMA_DATA) -> tuple[Tensor, Tensor]:
    """Tangents of the network's inputs (x_hat, t): cos t · sin t · (dx_hat/dt, 1).  (sCM §4.2)

    t [B]; D [B, C, H, W].  -> v_x [B, C, H, W], v_t [B]
    """
    v_t = torch.cos(t) * torch.sin(t)
    return expand_time(v_t, D) * D / sigma_data, v_t


def consistency_tangent(
    F_minus: Tensor,
    F_prime: Tensor,
    D: Tensor,
    x_t: Tensor,
    t: Tensor,
    r: float,
    sigma_data: float = SIGMA_DATA,
) -> Tensor:
    """g = −cos² t (σ_d F⁻ − D) − r (cos t sin t x_t + σ_d F'), r the tangent warm-up.  (Algorithm 1)

    At r = 1 this is cos t · df/dt along the teacher's flow.  All [B, C, H, W]; t [B].
    """
    t = expand_time(t, x_t)
    c, s = torch.cos(t), torch.sin(t)
    return -(c**2) * (sigma_data * F_minus - D) - r * (c * s * x_t + sigma_data * F_prime)


def normalise_tangent(g: Tensor, constant: float = 0.1) -> Tensor:
    """g / (‖g‖₂ + c), the norm per sample over C, H, W.  (sCM §4.2)"""
    norm = torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True)
    return g / (norm + constant)


def consistency_loss(
    F: Tensor, F_minus: Tensor, g: Tensor, logvar: Tensor, t: Tensor, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """mean[ e^(−logvar) / (σ_d tan t) · (F − F⁻ − g)² + logvar ].  (Algorithm 1)

    Pure noise, t = π/2, counts as 0: nothing there would hold logvar, which the loss else drives to −∞.
    F carries the gradient; F⁻ and g carry none.  logvar, t [B].  -> scalar
    """
    counts = torch.cos(t) > PURE_NOISE
    weight = counts * torch.exp(-logvar) / (sigma_data * torch.tan(t))
    return (expand_time(weight, F) * (F - F_minus - g).square()).mean() + (counts * logvar).mean()


def tangent_warmup(generator_updates: int, warmup_updates: int) -> float:
    """r = min(1, generator updates done / warm-up).  (sCM §4.1)"""
    return min(1.0, generator_updates / max(1, warmup_updates))


def settled_logvar(t: Tensor, values: int, sigma_data: float = SIGMA_DATA) -> Tensor:
    """Where logvar comes to rest while ‖g‖ ≈ 1: ln of the weighted square, −ln(C·H·W · σ_d tan t).

    values  C·H·W.  It is the minimum over logvar of the loss above, so the loss is 1 + this there.
    """
    return -torch.log(values * sigma_data * torch.tan(t))


# ---- a teacher's whole path -----------------------------------------------------------------------


def end_point_loss(x_0: Tensor, end: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """mean[ (f(x_t, t) − x_end)² ] / σ_d², x_end the end of the teacher's path through x_t: both are x_0 in size.

    What knowledge distillation of a sampler does from noise (arXiv 2101.02388), here from any state of the
    path. Its minimum is the mean of the ends that x_t leads to, and 0 where the path is the flow's own: there
    x_t has one end.  Both [B, C, H, W].  -> scalar
    """
    return (x_0 - end).square().mean() / sigma_data**2


# ---- a straighter path ----------------------------------------------------------------------------


def self_consistency_loss(x_0: Tensor, later_x_0: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """mean[ (f(x_t, t) − f(x_s, s))² ] / σ_d², x_s on the circle through f(x_t, t) and the noise that leads there.

    Ours, beside the paper's losses: it asks for straight paths. Consistency distillation (arXiv 2303.01469) takes
    x_s from the flow itself, where an exact student has no distance; on the circle it has one, unless all data is
    one point (`test_distill_variants.py` has the Gaussian case). The target f(x_s, s) carries no gradient.
    Both [B, C, H, W].  -> scalar
    """
    return (x_0 - later_x_0).square().mean() / sigma_data**2


# ---- LADD -----------------------------------------------------------------------------------------


def generator_adversarial_loss(fake_logits: Tensor) -> Tensor:
    """−mean(logits).  (SANA-Sprint Eq. 10)"""
    return -fake_logits.mean()


def discriminator_hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """½ · (mean relu(1 − real) + mean relu(1 + fake)).  (SANA-Sprint Eq. 11)"""
    return 0.5 * (relu(1 - real_logits).mean() + relu(1 + fake_logits).mean())


def generator_relativistic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(−(fake − real)), logit by logit.  (R3GAN, arXiv 2501.05441; AFM, arXiv 2511.22475)

    real, fake  [B, L], of the same prompts in the same order.  -> scalar
    """
    return softplus(real_logits - fake_logits).mean()


def discriminator_relativistic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(−(real − fake)), as above; ln 2 where the two cannot be told apart.

    real [B, L]; fake [K·B, L], of each of K kinds for the same prompts in the same order.  -> scalar
    """
    kinds = len(fake_logits) // len(real_logits)
    return softplus(fake_logits - real_logits.repeat(kinds, 1)).mean()


def nearby_penalty(logits: Tensor, nearby_logits: Tensor) -> Tensor:
    """mean (D(x) − D(x + α n))²: R1 on real samples, R2 on generated ones, without a second derivative.

    Over n ~ N(0, I) and for small α it is α² ‖∇D‖² for each logit.  (APT, arXiv 2501.08316 §3.4; FastGen)
    Both of one shape.  -> scalar
    """
    return (logits - nearby_logits).square().mean()


# ---- distribution matching --------------------------------------------------------------------------

SMALLEST = 1e-5  # of the normaliser: two networks that agree to this have nothing more to say


def distribution_matching_loss(x_0: Tensor, fake_x_0: Tensor, real_x_0: Tensor) -> Tensor:
    """mean ‖x_0 − sg[x_0 − g]‖², g = (f_fake − f_real) / mean |x_0 − f_real|.  (rCM, arXiv 2510.08431; DMD2)

    Its gradient in x_0 is 2g / (B·C·H·W), and g is along the difference of the two scores:
    f_fake − f_real = (σ_d sin t)² / cos t · ∇ log (p_fake / p_real)(x_t).

    x_0       the student's own sample, with its gradient
    fake_x_0  what the score of the student's distribution makes of it after renoising; real_x_0: the teacher's
    All [B, C, H, W]; the mean below the fraction is per sample.  -> scalar
    """
    with torch.no_grad():
        distance = (x_0 - real_x_0).abs().mean(dim=(1, 2, 3), keepdim=True)
        g = (fake_x_0 - real_x_0) / distance.clamp_min(SMALLEST)
        target = x_0 - g
    return (x_0 - target).square().mean()
