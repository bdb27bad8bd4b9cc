import math

import pytest
import torch

from sprint.maths.trigflow import (
    HALF_PI,
    SIGMA_DATA,
    data_estimate,
    diffuse,
    expand_time,
    flow_scale,
    flow_time,
    from_flow_input,
    gaussian_consistency,
    gaussian_velocity,
    ideal_velocity,
    noise_estimate,
    to_flow_input,
    to_flow_velocity,
    to_trig_velocity,
    trig_time,
    velocity_from_data,
)
from tests.tolerance import assert_close, central, near, rounding, sampling

EXACT = rounding(torch.float64, steps=20)
TIMES = torch.tensor([0.0, 1e-6, 0.3, math.pi / 4, 1.0, 1.5, HALF_PI], dtype=torch.float64)


@pytest.fixture
def ends():
    """latent and noise, one sample for each of TIMES"""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(TIMES), 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize(
    ("t", "t_fm"), [(0.0, 0.0), (math.pi / 4, 0.5), (HALF_PI, 1.0), (math.atan(3), 0.75)]
)
def test_the_two_clocks_at_known_times(t, t_fm):
    t, t_fm = torch.tensor(t, dtype=torch.float64), torch.tensor(t_fm, dtype=torch.float64)
    assert flow_time(t).item() == near(t_fm.item(), EXACT, scale=1)
    assert trig_time(t_fm).item() == near(t.item(), EXACT, scale=1)
    assert flow_scale(t_fm).item() == near(1 / (math.sin(t) + math.cos(t)), EXACT)


def test_clocks_there_and_back():
    t = torch.linspace(0, HALF_PI, 1001, dtype=torch.float64)
    assert_close(trig_time(flow_time(t)), t, EXACT)
    t_fm = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert_close(flow_time(trig_time(t_fm)), t_fm, EXACT)


def test_the_path_begins_at_the_data_and_ends_at_the_noise(ends):
    latent, noise = ends
    x_t = diffuse(SIGMA_DATA * latent, noise, TIMES)
    assert torch.equal(x_t[0], SIGMA_DATA * latent[0])
    assert_close(x_t[3], math.sqrt(0.5) * SIGMA_DATA * (latent + noise)[3], EXACT)
    assert_close(x_t[-1], SIGMA_DATA * noise[-1], EXACT)


def test_what_the_flow_network_sees_is_the_flow_path(ends):
    latent, noise = ends
    x_hat = diffuse(SIGMA_DATA * latent, noise, TIMES) / SIGMA_DATA
    t_fm = flow_time(TIMES)
    s = expand_time(t_fm, latent)
    assert_close(to_flow_input(x_hat, t_fm), (1 - s) * latent + s * noise, EXACT)
    assert_close(from_flow_input(to_flow_input(x_hat, t_fm), t_fm), x_hat, EXACT)


def test_the_flow_velocity_becomes_the_trig_velocity_and_back(ends):
    latent, noise = ends
    t_fm = flow_time(TIMES)
    x_fm = to_flow_input(diffuse(SIGMA_DATA * latent, noise, TIMES) / SIGMA_DATA, t_fm)
    F = to_trig_velocity(noise - latent, x_fm, t_fm)
    assert_close(F, ideal_velocity(latent, noise, TIMES), EXACT)
    assert_close(to_flow_velocity(F, x_fm, t_fm), noise - latent, EXACT)


def test_any_velocity_goes_round(ends):
    """Also where v is not the velocity of the pair behind x_fm, as a network's never is."""
    v, x_fm = ends
    t_fm = flow_time(TIMES)
    assert_close(to_flow_velocity(to_trig_velocity(v, x_fm, t_fm), x_fm, t_fm), v, EXACT)


def test_the_ideal_velocity_knows_both_ends(ends):
    latent, noise = ends
    x_0 = SIGMA_DATA * latent
    x_t, F = diffuse(x_0, noise, TIMES), ideal_velocity(latent, noise, TIMES)
    assert_close(data_estimate(x_t, F, TIMES), x_0, EXACT)
    assert_close(noise_estimate(x_t, F, TIMES), SIGMA_DATA * noise, EXACT)
    assert_close(velocity_from_data(x_t, x_0, TIMES)[2:], F[2:], EXACT)


def test_the_path_moves_with_sigma_data_times_F(ends):
    latent, noise = ends
    h = 1e-5
    difference = diffuse(SIGMA_DATA * latent, noise, TIMES + h) - diffuse(
        SIGMA_DATA * latent, noise, TIMES - h
    )
    assert_close(difference / (2 * h), SIGMA_DATA * ideal_velocity(latent, noise, TIMES), central(h, EXACT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_time_is_refused(dtype):
    x, t = torch.zeros(2, 1, 1, 1), torch.tensor([0.5, 1.0], dtype=dtype)
    with pytest.raises(TypeError, match="float32 or float64"):
        diffuse(x, x, t)
    with pytest.raises(TypeError, match="float32 or float64"):
        to_flow_input(x, flow_time(t))


# ---- Gaussian data ----------------------------------------------------------------------------------

SPREADS = pytest.mark.parametrize("a", [0.2, SIGMA_DATA, 2.0])


@SPREADS
def test_gaussian_consistency_is_the_identity_at_the_data_and_scales_the_noise(a):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
    at = torch.full((9,), 0.0, dtype=torch.float64)
    assert_close(gaussian_consistency(x, at, a), x, EXACT)
    assert_close(gaussian_consistency(x, at + HALF_PI, a), a / SIGMA_DATA * x, EXACT)


@SPREADS
def test_gaussian_consistency_is_constant_along_the_flow(a):
    """df/dt = ∂f/∂t + ∂f/∂x · σ_d F = 0"""
    t = TIMES
    x = torch.linspace(-1, 1, len(t), dtype=torch.float64).reshape(-1, 1, 1, 1)
    D = SIGMA_DATA * gaussian_velocity(x, t, a)
    _, change = torch.func.jvp(lambda x, t: gaussian_consistency(x, t, a), (x, t), (D, torch.ones_like(t)))
    assert D.abs().max() > 0.1 or a == SIGMA_DATA
    assert change.abs().max() < EXACT * max(1, D.abs().max().item())


@SPREADS
def test_gaussian_velocity_is_the_posterior_mean(a):
    """E[x_0 | x_t] of two Gaussians by hand, and a regression of the ideal velocity on x_t."""
    t = TIMES
    x = torch.linspace(-1, 1, len(t), dtype=torch.float64).reshape(-1, 1, 1, 1)
    c, s = torch.cos(t).reshape(x.shape), torch.sin(t).reshape(x.shape)
    posterior = a**2 * c / (a**2 * c**2 + SIGMA_DATA**2 * s**2) * x
    assert_close(data_estimate(x, gaussian_velocity(x, t, a), t), posterior, EXACT)

    latent, noise = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latent = latent * a / SIGMA_DATA
    at = torch.full_like(latent, 0.6)
    x_t = diffuse(SIGMA_DATA * latent, noise, at)
    slope = (x_t * ideal_velocity(latent, noise, at)).mean() / x_t.square().mean()
    expected = gaussian_velocity(torch.ones(1, dtype=torch.float64), at[:1], a).item()
    left_over = (ideal_velocity(latent, noise, at) - expected * x_t).std() / x_t.std()
    assert slope.item() == near(expected, sampling(left_over.item(), 200_000), scale=1)
