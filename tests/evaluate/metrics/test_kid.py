"""KID against torchmetrics' arithmetic, against plain loops, and where it must be 0."""

import numpy as np
import pytest
import torch

from sprint.base.errors import SprintError
from sprint.evaluate.metrics.kid import Kid, kid, squared_mmd
from tests.tolerance import near, rounding


def features(n, dim, seed, shift=0.0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


def test_one_by_hand():
    # D = 1, k(x, y) = (xy + 1)³.  {0, 1} and {1, 2}: k(0, 1) = 1, k(1, 2) = 27; across 1, 1, 8, 27
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert squared_mmd(a.double(), b.double()) == near(
        1 + 27 - 2 * 37 / 4, rounding(torch.float64, terms=4), scale=28
    )


def test_agrees_with_torchmetrics_subset_by_subset():
    from torchmetrics.image.kid import poly_mmd

    a, b = features(60, 16, 0), features(50, 16, 1, shift=0.2)
    draw, distances = np.random.RandomState(7), []
    for _ in range(5):
        chosen_a = a[draw.choice(60, 40, replace=False)].double()
        chosen_b = b[draw.choice(50, 40, replace=False)].double()
        distances.append(poly_mmd(chosen_a, chosen_b).item())
    got = kid(a, b, subset_size=40, subsets=5, seed=7)
    largest = ((a.double().square().sum(1) / 16 + 1) ** 3).max().item()  # of the kernels that cancel
    of_kernels = rounding(torch.float64, terms=40 * 40, steps=2)
    assert got.mean == near(np.mean(distances), of_kernels, scale=largest)
    assert got.std == near(np.std(distances), of_kernels, scale=largest)
    assert got.std > 0


def test_around_zero_for_equal_distributions_and_far_from_it_for_others():
    a, same, other = features(400, 8, 0), features(400, 8, 1), features(400, 8, 2, shift=0.5)
    close, far = kid(a, same, 200, 20), kid(a, other, 200, 20)
    assert abs(close.mean) < 0.05  # not rounding: of these samples
    assert far.mean > 10 * abs(close.mean)


def test_the_estimate_has_no_bias_where_fid_has():
    small = [kid(features(40, 8, 2 * k), features(40, 8, 2 * k + 1), 40, 1).mean for k in range(200)]
    standard_error = np.std(small) / len(small) ** 0.5
    assert abs(np.mean(small)) < 3 * standard_error


def test_half_precision_features_are_compared_in_double():
    a = features(100, 8, 0).bfloat16()
    b = features(100, 8, 1).bfloat16()
    assert kid(a, b, 50, 3) == kid(a.double(), b.double(), 50, 3)


def test_a_seed_repeats_and_another_differs():
    a, b = features(100, 8, 0), features(100, 8, 1)
    assert kid(a, b, 50, 3) == kid(a, b, 50, 3, seed=0)
    assert kid(a, b, 50, 3) != kid(a, b, 50, 3, seed=1)
    assert isinstance(kid(a, b, 50, 3), Kid)


def test_what_has_no_distance_is_refused_in_one_line():
    a = features(20, 8, 0)
    with pytest.raises(SprintError, match="subsets of 1000 from 10 pictures; give 2 to 10"):
        kid(a, a[:10])
    with pytest.raises(SprintError, match="features of 8 and of 4 numbers"):
        kid(a, a[:, :4], 10)
    with pytest.raises(SprintError, match="KID: a feature is NaN"):
        kid(a, a / 0, 10)
