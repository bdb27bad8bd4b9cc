import math

import pytest
import torch
from diffusers import SCMScheduler

from sprint.base.errors import SprintError
from sprint.maths.schedule import (
    MAX_TIME,
    check_times,
    lognormal_trig_times,
    shift_flow_time,
    shifted_logit_normal_flow_times,
    student_times,
    teacher_times,
    with_max_time,
)
from sprint.maths.trigflow import HALF_PI, SIGMA_DATA, flow_time
from tests.tolerance import near, rounding, sampling

COUNT = 100_000
QUANTILES = torch.tensor([0.1, 0.5, 0.9])
NORMAL_QUANTILES = torch.tensor([-1.2816, 0.0, 1.2816])


def of_quantile(slope: float) -> float:
    """Sampling error of a quantile of t(z), z normal and dt/dz at most `slope`: √(q (1 − q)) / density at q = 0.1."""
    return sampling(slope * 0.3 / 0.1755, COUNT)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("mean", "std"), [(0.2, 1.6), (0.0, 1.6), (-0.6, 1.0)])
def test_trig_times_have_the_density_of_the_paper(mean, std):
    t = lognormal_trig_times(COUNT, mean, std, seeded())
    z = torch.log(SIGMA_DATA * torch.tan(t.double()))
    assert z.mean().item() == near(mean, sampling(std, COUNT), scale=1)
    assert z.std().item() == near(std, sampling(std / math.sqrt(2), COUNT), scale=1)
    expected = torch.atan(torch.exp(mean + std * NORMAL_QUANTILES) / SIGMA_DATA)
    torch.testing.assert_close(t.quantile(QUANTILES), expected, rtol=0, atol=of_quantile(std / 2))
    assert t.dtype == torch.float32 and t.min() > 0 and t.max() < HALF_PI


def test_shifted_flow_times_have_their_density():
    t_fm = shifted_logit_normal_flow_times(COUNT, 3.0, seeded())
    slope = 0.3  # at most, of 3 s / (1 + 2 s) with s = sigmoid(z)
    median = 3 * 0.5 / (1 + 2 * 0.5)
    assert t_fm.median().item() == near(median, of_quantile(slope), scale=1)
    expected = 3 * torch.sigmoid(NORMAL_QUANTILES) / (1 + 2 * torch.sigmoid(NORMAL_QUANTILES))
    torch.testing.assert_close(t_fm.quantile(QUANTILES), expected, rtol=0, atol=of_quantile(slope))
    assert t_fm.min() > 0 and t_fm.max() < 1


def test_times_come_from_the_generator_alone():
    torch.manual_seed(0)
    first = lognormal_trig_times(4, 0.2, 1.6, seeded(7))
    torch.manual_seed(1)
    assert torch.equal(first, lognormal_trig_times(4, 0.2, 1.6, seeded(7)))
    assert not torch.equal(first, lognormal_trig_times(4, 0.2, 1.6, seeded(8)))


@pytest.mark.parametrize("probability", [0.0, 0.5, 0.7, 1.0])
def test_max_time_is_half_pi_for_its_share_and_leaves_the_rest(probability):
    t = lognormal_trig_times(20_000, 0.2, 1.6, seeded())
    weighted = with_max_time(t, probability, seeded(1))
    chosen = weighted != t
    assert chosen.float().mean().item() == near(
        probability, sampling(math.sqrt(probability * (1 - probability)), 20_000), scale=1
    )
    assert (weighted[chosen] == torch.tensor(HALF_PI)).all()
    assert chosen.sum() == (weighted == torch.tensor(HALF_PI)).sum()


@pytest.mark.parametrize(
    ("sigma", "shift", "expected"), [(0.5, 3.0, 0.75), (0.25, 4.0, 4 / 7), (0.3, 1.0, 0.3)]
)
def test_shift_by_hand(sigma, shift, expected):
    assert shift_flow_time(torch.tensor(sigma), shift).item() == pytest.approx(expected)
    assert shift_flow_time(torch.tensor([0.0, 1.0]), shift).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_student_times_are_those_of_diffusers(steps):
    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    assert student_times(steps) == near(scheduler.timesteps.tolist(), rounding(torch.float32, steps=4))
    assert check_times(student_times(steps)) == student_times(steps)


def test_student_times_of_the_paper():
    assert student_times(1) == pytest.approx([math.pi / 2, 0], abs=1e-5)  # printed with so many digits
    assert student_times(2) == [MAX_TIME, 1.3, 0.0]
    assert student_times(4) == pytest.approx([1.5708, 1.1781, 0.7854, 0.3927, 0.0], abs=1e-4)  # too


def test_teacher_times_are_shifted_flow_times():
    times = teacher_times(4, shift=3.0)
    t_fm = flow_time(torch.tensor(times, dtype=torch.float64))
    assert t_fm.tolist() == near([1.0, 0.9, 0.75, 0.5, 0.0], rounding(torch.float64, steps=10))
    assert times[0] == HALF_PI and times[-1] == 0.0
    assert check_times(teacher_times(20))


@pytest.mark.parametrize("default_times", [student_times, teacher_times])
def test_no_steps_is_an_error(default_times):
    with pytest.raises(SprintError, match="at least 1, not 0"):
        default_times(0)


@pytest.mark.parametrize(
    ("times", "problem"),
    [
        ([1.5, 1.5, 0.0], "fall strictly"),
        ([1.0, 1.3, 0.0], "fall strictly"),
        ([1.5, 0.1], "end at 0"),
        ([0.0], "end at 0"),
        ([], "end at 0"),
        ([math.nan, 0.0], "fall strictly"),
        ([1.6, 0.0], "at most at π/2"),
        ([-1.0, 0.0], "fall strictly"),
    ],
)
def test_times_that_cannot_be_walked(times, problem):
    with pytest.raises(SprintError, match=problem):
        check_times(times)


@pytest.mark.parametrize("times", [[1.5683, 1.3, 0], [1.5683, 1.3, 1.1, 0.6, 0], [MAX_TIME, 0]])
def test_times_of_the_paper_are_accepted(times):
    assert check_times(times) == times
