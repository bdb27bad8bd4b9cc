import itertools
import math

import pytest
import torch

from sprint.maths.samplers import Noise, sample_consistency, sample_ode, trace_ode
from sprint.maths.schedule import student_times, teacher_times
from sprint.maths.trigflow import SIGMA_DATA, gaussian_consistency, gaussian_velocity, velocity_from_data
from tests.tolerance import assert_close, near, rounding, sampling

A = 0.2  # spread of the data
SHAPE = (2, 3, 3)
SEEDS = [5, 6, 7]


def elementwise(steps: int) -> float:
    """Ten roundings of each number a step."""
    return rounding(torch.float32, steps=10 * steps)


def exact_teacher(x_hat, t):
    return gaussian_velocity(SIGMA_DATA * x_hat, t, A)


def exact_student(x_hat, t):
    x_t = SIGMA_DATA * x_hat
    return velocity_from_data(x_t, gaussian_consistency(x_t, t, A), t)


def ode_error(steps: int) -> float:
    """Against the closed form: the noise N(0, σ_d²) is carried to a/σ_d times itself."""
    exact = Noise(SEEDS, SHAPE).draw() * A / SIGMA_DATA
    sampled = sample_ode(exact_teacher, Noise(SEEDS, SHAPE), teacher_times(steps, shift=1.0))
    return ((sampled - exact).norm() / exact.norm()).item()


def test_ode_sampler_converges_to_the_closed_form_at_first_order():
    errors = [ode_error(steps) for steps in (16, 32, 64, 128)]
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(errors)]
    assert errors[-1] < 0.02
    assert ratios == pytest.approx([2, 2, 2], abs=0.15)  # not rounding: the next order


def test_ode_sampler_is_exact_where_the_ends_are_known():
    """A velocity whose both ends never change: one step or many give the same."""
    latent = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))

    def F(x_hat, t):
        x_t = SIGMA_DATA * x_hat
        return velocity_from_data(x_t, SIGMA_DATA * latent, t)

    for steps in (1, 4, 20):
        out = sample_ode(F, Noise(SEEDS, SHAPE), teacher_times(steps))
        assert_close(out, latent, elementwise(steps))


def test_one_consistency_step_is_the_closed_form():
    out = sample_consistency(exact_student, Noise(SEEDS, SHAPE), [math.pi / 2, 0.0])
    assert_close(out, Noise(SEEDS, SHAPE).draw() * A / SIGMA_DATA, elementwise(1))


def test_two_consistency_steps_by_hand():
    noise = Noise(SEEDS, SHAPE)
    first, second = noise.draw(), noise.draw()
    x_t = math.cos(1.3) * A * first + math.sin(1.3) * SIGMA_DATA * second
    x_0 = A * x_t / math.sqrt((A * math.cos(1.3)) ** 2 + (SIGMA_DATA * math.sin(1.3)) ** 2)
    out = sample_consistency(exact_student, Noise(SEEDS, SHAPE), [math.pi / 2, 1.3, 0.0])
    assert_close(out, x_0 / SIGMA_DATA, elementwise(2))
    assert (first - second).norm() > 1


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_an_exact_student_keeps_the_spread_of_the_data(steps):
    out = sample_consistency(exact_student, Noise(list(range(2000)), SHAPE), student_times(steps))
    assert out.std().item() * SIGMA_DATA == near(A, sampling(math.sqrt(0.5), out.numel()))


@pytest.mark.parametrize("sampler", [sample_consistency, sample_ode])
def test_a_network_is_called_once_a_step_with_unit_scale_pictures_and_float_times(sampler):
    seen = []

    def F(x_hat, t):
        seen.append((x_hat.std().item(), t))
        return exact_teacher(x_hat, t)

    times = [math.pi / 2, 1.3, 0.6, 0.0]
    sampler(F, Noise(list(range(200)), SHAPE), times)
    assert len(seen) == 3
    assert seen[0][0] == near(1.0, sampling(math.sqrt(0.5), 200 * math.prod(SHAPE)))
    for time, (_, t) in zip(times, seen, strict=False):
        assert t.shape == (200,) and t.dtype == torch.float32
        assert t.unique().item() == pytest.approx(time)


@pytest.mark.parametrize("sampler", [sample_consistency, sample_ode])
def test_a_picture_depends_on_its_own_seed_only(sampler):
    times = student_times(3)
    together = sampler(exact_student, Noise([1, 2, 3], SHAPE), times)
    alone = sampler(exact_student, Noise([3], SHAPE), times)
    assert_close(together[2:], alone, elementwise(3))
    assert not torch.equal(together[1], together[2])


def test_noise_goes_on_and_repeats_from_its_seed():
    noise = Noise([4], SHAPE)
    first, second = noise.draw(), noise.draw()
    assert first.shape == (1, *SHAPE) and first.dtype == torch.float32
    assert not torch.equal(first, second)
    assert torch.equal(Noise([4], SHAPE).draw(), first)
    assert torch.equal(first[0], torch.randn(SHAPE, generator=torch.Generator().manual_seed(4)))


# ---- the whole way ------------------------------------------------------------------------------------


def test_a_traced_way_is_the_sampled_one_and_in_closed_form():
    """Of Gaussian data the velocity is κ(t)·x, so a step from t to s multiplies by cos(t − s) − sin(t − s)·κ(t)."""
    times = teacher_times(6)
    path = trace_ode(exact_teacher, Noise(SEEDS, SHAPE), times)
    assert torch.equal(path.latent, sample_ode(exact_teacher, Noise(SEEDS, SHAPE), times))
    noise = SIGMA_DATA * Noise(SEEDS, SHAPE).draw()
    assert path.states.shape == path.velocity.shape == (3, 6, *SHAPE) and torch.equal(
        path.states[:, 0], noise
    )
    factor = 1.0
    for k, (now, later) in enumerate(itertools.pairwise(times)):
        c, s = math.cos(now), math.sin(now)
        slope = (SIGMA_DATA**2 - A**2) * s * c / ((A * c) ** 2 + (SIGMA_DATA * s) ** 2)
        assert_close(path.states[:, k], factor * noise, elementwise(k + 1))
        scale = (factor * noise).abs().max().item()
        assert_close(path.velocity[:, k], factor * slope * noise, elementwise(k + 2), scale)
        factor *= math.cos(now - later) - math.sin(now - later) * slope
    assert_close(path.latent, factor * noise / SIGMA_DATA, elementwise(7))
