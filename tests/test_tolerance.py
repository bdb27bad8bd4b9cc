"""The tolerances themselves: sums in any order stay within them, and what is wrong does not."""

import math

import pytest
import torch
from torch import nn

from tests.tiny import tiny_batch, tiny_network
from tests.tolerance import (
    assert_all_close,
    assert_close,
    assert_moved_alike,
    central,
    growing,
    near,
    of_network,
    readings,
    rounding,
    sampling,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])


def one_after_the_other(x: torch.Tensor) -> torch.Tensor:
    """The sum in x's own precision, a term at a time."""
    total = x.new_zeros(())
    for term in x:
        total = total + term
    return total


@DTYPES
@pytest.mark.parametrize("terms", [1, 10, 100, 1000])
def test_sums_in_two_orders_agree_and_a_lost_term_shows(dtype, terms):
    x = (
        torch.rand(terms, generator=torch.Generator().manual_seed(terms), dtype=torch.float64)
        .add(0.5)
        .to(dtype)
    )
    forth, back, exact = one_after_the_other(x), one_after_the_other(x.flip(0)), x.double().sum()
    tolerance = rounding(dtype, terms=terms)
    assert_close(back, forth, tolerance)
    assert abs(forth.double() - exact) <= tolerance * exact
    if tolerance * terms < 0.5:  # in bfloat16 a term of a thousand is less than rounding
        with pytest.raises(AssertionError):
            assert_close(back - x[0], forth, tolerance)


def test_the_smaller_of_the_two_bounds_holds():
    eps = torch.finfo(torch.float32).eps
    assert rounding(torch.float32) == eps
    assert rounding(torch.float32, terms=9) == 9 * eps  # the worst case: nine roundings
    assert rounding(torch.float32, terms=10_000, steps=3) == 3 * 4 * 100 * eps  # a walk


@torch.no_grad()
def test_a_network_in_float32_is_within_it_and_one_weight_wrong_is_not():
    network, text = tiny_network(), tiny_batch(4)
    inputs = text.latent, text.text, torch.full((4,), 0.5)
    exact = network.double()(*(x.double() for x in inputs), return_dict=False)[0].float()
    network.float()
    assert_close(network(*inputs, return_dict=False)[0], exact, of_network(network))
    network.transformer_blocks[1].attn2.to_v.weight[3, 5] += 0.01
    with pytest.raises(AssertionError):
        assert_close(network(*inputs, return_dict=False)[0], exact, of_network(network))


def test_of_network_is_a_walk_along_all_layers_and_passes():
    network = nn.Sequential(nn.Linear(30, 20), nn.SiLU(), nn.Conv2d(4, 7, 5))
    assert of_network(network) == rounding(torch.float32, terms=30 + 100)
    assert of_network(network.double(), passes=2, terms=50) == rounding(torch.float64, terms=2 * (50 + 100))


def test_sampling_is_five_standard_errors():
    means = torch.randn(2000, 100, generator=torch.Generator().manual_seed(0)).mean(1)
    assert means.abs().max() < sampling(1.0, 100) < 2 * means.abs().max()


def test_a_central_difference_errs_by_truncation_or_by_rounding():
    few = rounding(torch.float64, steps=4)
    for h in (1e-2, 1e-5, 1e-9):
        error = abs((math.exp(h) - math.exp(-h)) / (2 * h) - 1)
        assert error < central(h, few)
        assert h < 1e-3 or central(h, few) < 10 * error


def test_near_measures_by_the_largest_or_by_the_scale_given():
    assert near([1.0, 0.0], 1e-8) == [1.0, 1e-9] and near([1.0, 0.0], 1e-8) != [1.0, 1e-7]
    assert near(0.0, 1e-8, scale=1) == 1e-9 and near(2.1, 1e-8) != 2.0


def test_readings_and_losses_one_after_the_other():
    assert readings({"loss": 0.0, "norm": 100.0}, 1e-3) == {"loss": 1e-4, "norm": 100.001}
    assert readings({"loss": 0.0, "norm": 100.0}, 1e-3) != {"loss": 1e-2, "norm": 100.0}
    assert growing([1.0, 1.0, 1.0], 1e-3) == [1.0005, 1.0015, 1.0025]
    assert growing([1.0, 1.0, 1.0], 1e-3) != [1.0015, 1.0, 1.0] and growing([1.0], 1e-3, done=1) == [1.0015]


def test_tensors_by_name_are_measured_by_the_largest_of_all():
    expected = {"large": torch.ones(3), "nothing": torch.full((2,), 1e-9)}
    assert_all_close({"large": torch.ones(3), "nothing": torch.zeros(2)}, expected, 1e-6)
    with pytest.raises(AssertionError, match="nothing"):
        assert_all_close({"large": torch.ones(3), "nothing": torch.full((2,), 1e-3)}, expected, 1e-6)
    with pytest.raises(AssertionError):
        assert_all_close({"large": torch.ones(3)}, expected, 1e-6)


def test_weights_moved_by_rounding_alone_may_go_either_way_if_they_are_few():
    expected = {"weight": torch.zeros(1000)}
    moved = torch.zeros(1000)
    moved[0] = 0.2
    assert_moved_alike({"weight": moved}, expected, way=0.1, tolerance=1e-4)
    with pytest.raises(AssertionError):
        assert_moved_alike({"weight": 2 * moved}, expected, way=0.1, tolerance=1e-4)
    with pytest.raises(AssertionError):
        assert_moved_alike({"weight": torch.full((1000,), 0.05)}, expected, way=0.1, tolerance=1e-4)
