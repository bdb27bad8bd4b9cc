import math

import pytest
import torch
from torch import nn

from sprint.maths import losses
from sprint.maths.dual import value_and_tangent
from sprint.maths.schedule import lognormal_trig_times
from sprint.maths.trigflow import (
    SIGMA_DATA,
    data_estimate,
    diffuse,
    expand_time,
    gaussian_consistency,
    gaussian_velocity,
)
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from tests.tiny import tiny_batch, tiny_network
from tests.tolerance import assert_close, central, near, of_network, rounding, sampling

EXACT = rounding(torch.float64, steps=10)  # closed forms of few operations


def pictures(*values: float) -> torch.Tensor:
    """One 1×1 picture of one channel a value."""
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


# ---- by hand ------------------------------------------------------------------------------------------


def test_mean_square_error():
    assert losses.mean_square_error(pictures(1, 2), pictures(3, 2)).item() == 2.0


def test_tangent_inputs_are_the_teachers_direction_times_sin_cos():
    t = torch.tensor([0.0, math.pi / 4, math.pi / 2], dtype=torch.float64)
    v_x, v_t = losses.tangent_inputs(t, pictures(3, 3, 3))
    assert v_t.tolist() == near([0, 0.5, 0], EXACT)
    assert v_x.flatten().tolist() == near([0, 0.5 * 3 / SIGMA_DATA, 0], EXACT)


@pytest.mark.parametrize(
    ("r", "expected"), [(0.0, -0.5 * (0.5 * 2 - 3)), (1.0, 1.0 - (0.5 * 5 + 0.5 * 7)), (0.5, -2)]
)
def test_consistency_tangent(r, expected):
    """At t = π/4, c² = s·c = ½; F⁻ = 2, F' = 7, D = 3, x_t = 5."""
    t = torch.tensor([math.pi / 4], dtype=torch.float64)
    g = losses.consistency_tangent(pictures(2), pictures(7), pictures(3), pictures(5), t, r)
    assert g.item() == pytest.approx(expected)


def test_normalise_tangent_is_per_sample():
    g = torch.zeros(3, 2, 1, 1, dtype=torch.float64)
    g[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    g[1, :, 0, 0] = torch.tensor([0.06, 0.08])
    out = losses.normalise_tangent(g, constant=0.1)
    assert out[0].flatten().tolist() == pytest.approx([3 / 5.1, 4 / 5.1])
    assert out[1].flatten().tolist() == pytest.approx([0.3, 0.4])
    assert out[2].tolist() == [[[0.0]], [[0.0]]]


def test_consistency_loss():
    """Two samples at t = π/4 (tan t = 1): squares 4 and 1, weights e^(−logvar)/σ_d."""
    t = torch.full((2,), math.pi / 4, dtype=torch.float64)
    logvar = torch.tensor([0.0, math.log(2)], dtype=torch.float64)
    loss = losses.consistency_loss(pictures(5, 1), pictures(2, 1), pictures(1, 1), logvar, t)
    assert loss.item() == pytest.approx((2 * 4 + 1 * 1) / 2 + math.log(2) / 2)


def test_consistency_gradient_is_minus_two_weight_g():
    generator = torch.Generator().manual_seed(0)
    F = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64).requires_grad_()
    g = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.3, 0.9, 1.5], dtype=torch.float64)
    logvar = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    losses.consistency_loss(F, F.detach(), g, logvar, t).backward()
    weight = expand_time(torch.exp(-logvar) / (SIGMA_DATA * torch.tan(t)), F)
    assert_close(F.grad, -2 * weight * g / F.numel(), EXACT)


def test_logvar_settles_where_its_gradient_is_zero():
    """For ‖g‖ = 1: e^logvar = mean(g²)/(σ_d tan t), so −ln(C·H·W · σ_d tan t)."""
    g = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g /= g.flatten(1).norm(dim=1).reshape(3, 1, 1, 1)
    t = torch.tensor([0.1, math.atan(1 / SIGMA_DATA), 1.5], dtype=torch.float64)
    logvar = losses.settled_logvar(t, 4 * 8 * 8).requires_grad_()
    assert logvar[1].item() == pytest.approx(-math.log(256))
    loss = losses.consistency_loss(g * 0, g * 0, g, logvar, t)
    loss.backward()
    assert logvar.grad.abs().max() < rounding(torch.float64, terms=4 * 8 * 8, steps=2)
    assert loss.item() == pytest.approx(1 + logvar.mean().item())


def test_tangent_warmup_is_linear_then_one():
    assert [losses.tangent_warmup(n, 4) for n in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert losses.tangent_warmup(0, 0) == 0.0 and losses.tangent_warmup(1, 0) == 1.0


def test_self_consistency_is_the_mean_square_distance_in_latents():
    x_0, target = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 2.0]]], [[[0.0, -1.0]]]])
    assert losses.self_consistency_loss(x_0, target).item() == pytest.approx((1 + 4 + 0 + 1) / 4 / 0.5**2)


def test_pure_noise_counts_nothing_in_scm_and_holds_no_logvar():
    F, g = pictures(1.0, 3.0).float(), pictures(0.5, 7.0).float()
    t = torch.tensor([0.7, math.pi / 2])  # float32 rounds it to above π/2, where tan is negative
    logvar = torch.tensor([0.25, -3.0], requires_grad=True)
    F.requires_grad_()
    loss = losses.consistency_loss(F, F.detach(), g, logvar, t)
    alone = losses.consistency_loss(F[:1], F[:1].detach(), g[:1], logvar[:1], t[:1])
    assert loss.item() == near(alone.item() / 2, rounding(torch.float32, steps=10), scale=1.0)
    loss.backward()
    assert F.grad[1].abs().item() == 0 and logvar.grad[1].item() == 0
    assert F.grad[0].abs().item() > 0 and logvar.grad[0].item() != 0


def test_the_end_point_loss_is_least_at_the_mean_of_the_ends():
    ends = pictures(1.0, 4.0, -2.0)
    f = pictures(3.0).requires_grad_()
    loss = losses.end_point_loss(f.expand_as(ends), ends)
    assert loss.item() == near((4 + 1 + 25) / 3 / SIGMA_DATA**2, EXACT)
    (slope,) = torch.autograd.grad(loss, f)
    assert slope.item() == near(2 * (3.0 - 1.0) / SIGMA_DATA**2, EXACT)
    assert losses.end_point_loss(ends, ends).item() == 0


def test_adversarial_losses():
    real, fake = torch.tensor([2.0, 0.5, -1.0, 1.0]), torch.tensor([-3.0, 0.5])
    assert losses.generator_adversarial_loss(fake).item() == 1.25
    hinge = losses.discriminator_hinge_loss(real, fake)
    assert hinge.item() == pytest.approx(0.5 * ((0 + 0.5 + 2 + 0) / 4 + (0 + 1.5) / 2))
    assert losses.discriminator_hinge_loss(real * 0, fake * 0).item() == 1.0
    assert losses.discriminator_hinge_loss(real * 0 + 1, fake * 0 - 1).item() == 0.0


def test_relativistic_losses_are_of_pairs():
    """softplus(ln 3) = ln 4, softplus(−ln 3) = ln 4/3. Misaligned fakes follow the generated ones, in their order."""
    ln3 = math.log(3)
    real = torch.tensor([[1.0, 5.0], [2.0, 0.0]], dtype=torch.float64)
    apart = torch.tensor([[ln3, -ln3], [0.0, ln3]], dtype=torch.float64)  # real − fake
    fake = (real - apart).requires_grad_()
    generator = losses.generator_relativistic_loss(real, fake)
    assert generator.item() == near((2 * math.log(4) + math.log(4 / 3) + math.log(2)) / 4, EXACT)
    generator.backward()
    assert fake.grad.flatten().tolist() == near(
        [-3 / 16, -1 / 16, -2 / 16, -3 / 16], EXACT
    )  # −sigmoid(real − fake) / 4
    both = torch.cat([real - apart, real])
    heads = losses.discriminator_relativistic_loss(real, both)
    one = (2 * math.log(4 / 3) + math.log(4) + math.log(2)) / 4
    assert heads.item() == near((one + math.log(2)) / 2, EXACT)
    assert losses.discriminator_relativistic_loss(real, real).item() == near(math.log(2), EXACT)


def test_the_relativistic_loss_knows_no_height():
    """Where both logits rise nothing changes: there is no level at which a picture is real enough."""
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    for loss in (losses.generator_relativistic_loss, losses.discriminator_relativistic_loss):
        assert loss(real + 7, fake + 7).item() == near(
            loss(real, fake).item(), rounding(torch.float64, terms=30, steps=8)
        )


def test_nearby_penalty_of_a_linear_head_is_the_square_of_its_slope():
    """(w·x − w·(x + α n))² = α² (w·n)², and on the average α² ‖w‖²."""
    generator, n, alpha = torch.Generator().manual_seed(0), 20_000, 0.1
    w = torch.tensor([3.0, -4.0], dtype=torch.float64)
    x, noise = torch.randn(2, n, 2, generator=generator, dtype=torch.float64)
    found = losses.nearby_penalty(x @ w, (x + alpha * noise) @ w).item()
    assert found == near(
        alpha**2 * (noise @ w).square().mean().item(), rounding(torch.float64, terms=n, steps=4) / alpha
    )
    assert found == near(alpha**2 * 25, sampling(math.sqrt(2), n))


def test_distribution_matching_by_hand():
    """One sample of two numbers: mean |x_0 − f_real| = 2, g = (f_fake − f_real) / 2, loss mean g², gradient 2g / 2."""
    x_0 = pictures(1, 3).reshape(1, 2, 1, 1).requires_grad_()
    real, fake = (pictures(*v).reshape(1, 2, 1, 1) for v in ((0, 6), (4, 4)))
    loss = losses.distribution_matching_loss(x_0, fake, real)
    assert loss.item() == near((2**2 + 1**2) / 2, EXACT)
    loss.backward()
    assert x_0.grad.flatten().tolist() == near([2, -1], EXACT)


def test_distribution_matching_is_of_no_scale_and_each_sample_by_itself():
    generator = torch.Generator().manual_seed(0)
    x_0, fake, real = torch.randn(3, 4, 2, 3, 3, generator=generator, dtype=torch.float64)
    loss = losses.distribution_matching_loss(x_0, fake, real).item()
    each = [
        losses.distribution_matching_loss(*(x[k : k + 1] for x in (x_0, fake, real))).item() for k in range(4)
    ]
    exact = rounding(torch.float64, terms=72, steps=6)
    assert loss == near(sum(each) / 4, exact)
    scale = torch.tensor([1e-3, 1, 10, 1e4], dtype=torch.float64)[:, None, None, None]
    assert losses.distribution_matching_loss(*(scale * x for x in (x_0, fake, real))).item() == near(
        loss, exact
    )


def test_distribution_matching_is_finite_where_the_teacher_agrees_with_the_sample():
    """0 / 0 must not be NaN, nor touch the sample beside it."""
    x_0 = pictures(1, 3).requires_grad_()
    losses.distribution_matching_loss(x_0, pictures(1, 4), pictures(1, 2)).backward()
    assert x_0.grad.flatten().tolist() == near([0, 2], EXACT)


# ---- against the definition ---------------------------------------------------------------------------


@torch.no_grad()
def test_g_is_cos_t_times_df_dt_along_the_teachers_flow(true_float64):
    """Central differences of f(x_t, t) with x_t moving as the teacher says, on two Sana networks."""
    student = TrigFlowView(tiny_network(0).double(), DENSE_TIME)
    teacher = TrigFlowView(tiny_network(1).double(), DENSE_TIME)
    latent, text, mask = tiny_batch(3, dtype=torch.float64)
    t = torch.tensor([0.2, 0.8, 1.45], dtype=torch.float64)
    x_t = diffuse(SIGMA_DATA * latent, torch.randn_like(latent), t)
    D = SIGMA_DATA * teacher(x_t / SIGMA_DATA, t, text, mask)

    def F_theta(x_hat, t):
        return student(x_hat, t, text, mask)

    def f(x_t, t):
        return data_estimate(x_t, F_theta(x_t / SIGMA_DATA, t), t)

    F, F_prime = value_and_tangent(F_theta, x_t / SIGMA_DATA, t, *losses.tangent_inputs(t, D))
    g = losses.consistency_tangent(F, F_prime, D, x_t, t, r=1.0)
    h = 1e-5
    df_dt = (f(x_t + h * D, t + h) - f(x_t - h * D, t - h)) / (2 * h)
    expected = expand_time(torch.cos(t), g) * df_dt
    assert expected.norm() > 0.1
    assert ((g - expected).norm() / expected.norm()).item() < central(h, of_network(student, teacher))


# ---- trained to convergence -----------------------------------------------------------------------------


class SmallStudent(nn.Module):
    """F(x_hat, t) and logvar(t) of one-pixel pictures: two hidden layers on (x_hat, cos t, sin t)."""

    def __init__(self, width: int = 48):
        super().__init__()
        torch.manual_seed(0)
        self.F = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )
        self.logvar = nn.Linear(2, 1)

    def forward(self, x_hat, t):
        t = expand_time(t, x_hat)
        features = torch.cat([x_hat, torch.cos(t).expand_as(x_hat), torch.sin(t).expand_as(x_hat)], 1)
        return self.F(features.flatten(1)).reshape(x_hat.shape)

    def log_variance(self, t):
        return self.logvar(torch.stack([torch.cos(t), torch.sin(t)], 1)).squeeze(1)


@torch.no_grad()
def distance_from_closed_form(student: SmallStudent, a: float) -> float:
    """Relative root mean square of f − f* over the data's own marginals, t from 0.1 to π/2."""
    generator = torch.Generator().manual_seed(99)
    t = torch.linspace(0.1, math.pi / 2, 4000)
    x_0, noise = torch.randn(2, 4000, 1, 1, 1, generator=generator)
    x_t = diffuse(a * x_0, noise, t)
    expected = gaussian_consistency(x_t, t, a)
    f = data_estimate(x_t, student(x_t / SIGMA_DATA, t), t)
    return ((f - expected).square().mean() / expected.square().mean()).sqrt().item()


def train_scm(student: SmallStudent, a: float, steps: int, batch: int = 512, warmup: int = 200) -> None:
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        t = lognormal_trig_times(batch, -0.4, 1.4, generator)
        x_0, noise = torch.randn(2, batch, 1, 1, 1, generator=generator)
        x_t = diffuse(a * x_0, noise, t)
        D = SIGMA_DATA * gaussian_velocity(x_t, t, a)
        F, F_prime = value_and_tangent(student, x_t / SIGMA_DATA, t, *losses.tangent_inputs(t, D))
        r = losses.tangent_warmup(step, warmup)
        g = losses.normalise_tangent(losses.consistency_tangent(F.detach(), F_prime, D, x_t, t, r))
        loss = losses.consistency_loss(F, F.detach(), g, student.log_variance(t), t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()


@pytest.mark.parametrize("a", [0.2, 1.0])
def test_scm_on_gaussian_data_learns_the_closed_form(a):
    """Not the posterior mean, which is what regression gives: that is 0 at t = π/2, all of f* away."""
    student = SmallStudent()
    before = distance_from_closed_form(student, a)
    train_scm(student, a, steps=1000)
    after = distance_from_closed_form(student, a)
    print(f"a = {a}: {before:.3f} -> {after:.4f}")
    assert before > 0.3
    assert after < 0.05
