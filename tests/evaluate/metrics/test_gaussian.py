"""FID against closed forms of Gaussians, and the streaming statistics against numpy."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg

from sprint.base.errors import SprintError
from sprint.evaluate.metrics.gaussian import GaussianStatistics, fid, frechet_distance
from tests.tolerance import assert_close, near, rounding


def of_matrices(dim: int) -> float:
    """Two decompositions and some products of dim × dim matrices, each as good as a few sums of dim² terms."""
    return rounding(torch.float64, terms=dim**2, steps=10)


def rotation(dim, seed):
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator(seed), dtype=torch.float64))[0]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def features(n, dim, seed, shift=0.0):
    return torch.randn(n, dim, generator=generator(seed), dtype=torch.float64) + shift


def statistics(*batches):
    out = GaussianStatistics()
    for batch in batches:
        out.update(batch)
    return out


def test_one_dimension_is_the_squared_gap_of_means_and_deviations():
    # N(1, 2²) and N(4, 5²): (1 − 4)² + (2 − 5)² = 18
    distance = frechet_distance(*map(torch.tensor, ([1.0], [[4.0]], [4.0], [[25.0]])))
    assert distance == near(18.0, of_matrices(1))


def test_diagonal_covariances_add_up_by_axis():
    s1, s2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, 3.0])
    mean = torch.tensor([0.0, 1.0, -1.0])
    # means are equal: (1 − 2)² + (2 − 0.5)² + 0 = 3.25
    distance = frechet_distance(mean, s1.square().diag(), mean, s2.square().diag())
    assert distance == near(3.25, of_matrices(3))


def test_a_common_rotation_changes_nothing():
    q = rotation(3, 0)
    s1, s2 = (torch.tensor(s, dtype=torch.float64) for s in ([1.0, 2.0, 3.0], [2.0, 0.5, 3.0]))
    mean = torch.zeros(3, dtype=torch.float64)
    gap = torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)
    turn = lambda s: q @ s.square().diag() @ q.T  # noqa: E731
    assert frechet_distance(mean, turn(s1), q @ gap, turn(s2)) == near(3.25 + 4.0, of_matrices(3))


def test_covariances_that_do_not_commute():
    # 2×2: tr √(AB) = √(tr AB + 2 √det AB)
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    ab = a @ b
    expected = (a.trace() + b.trace() - 2 * torch.sqrt(ab.trace() + 2 * ab.det().sqrt())).item()
    assert expected > 1.5
    assert frechet_distance(zero, a, zero, b) == near(
        expected, of_matrices(2), scale=(a.trace() + b.trace()).item()
    )


def test_singular_covariances():
    # A point and a line: the line's variance, 9, plus the gap, 16.
    point, line = torch.zeros(2, 2), torch.tensor([[9.0, 0.0], [0.0, 0.0]])
    gap = torch.tensor([0.0, 4.0])
    assert frechet_distance(torch.zeros(2), point, gap, line) == near(25.0, of_matrices(2))
    # Fewer samples than dimensions.
    few = statistics(features(5, 40, 1))
    # the root of an eigenvalue that should be zero is the root of its error
    spread = few.covariance.trace().item()
    assert fid(few, few) == near(0.0, math.sqrt(of_matrices(40)), scale=spread)


def test_zero_for_equal_sets_and_symmetric():
    a, b = statistics(features(300, 20, 1)), statistics(1.5 * features(300, 20, 2, shift=0.3))
    spread = (a.covariance + b.covariance).trace().item()
    assert fid(a, a) == near(0.0, of_matrices(20), scale=spread)
    assert fid(a, b) == near(fid(b, a), of_matrices(20), scale=spread)
    assert fid(a, b) > 20 * (0.4**2)


def test_shifting_a_set_costs_the_squared_shift():
    x = features(500, 16, 3)
    shifted = fid(statistics(x), statistics(x + 0.5))
    assert shifted == near(16 * 0.25, of_matrices(16), scale=statistics(x).covariance.trace().item())


def test_agrees_with_torchmetrics_on_the_same_features():
    from torchmetrics.image.fid import _compute_fid

    a, b = (
        statistics(features(200, 32, 1)),
        statistics(1.5 * features(150, 32, 2, shift=0.3) @ rotation(32, 3)),
    )
    theirs = _compute_fid(a.mean, a.covariance, b.mean, b.covariance).item()
    assert theirs > 10
    assert fid(a, b) == near(theirs, of_matrices(32), scale=100)  # variances of 32 and 72


def test_agrees_with_the_matrix_root_of_pytorch_fid():
    x, y = (
        features(200, 32, 1).numpy(),
        1.5 * features(150, 32, 2, shift=0.3).numpy() @ rotation(32, 3).numpy(),
    )
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    gap = x.mean(0) - y.mean(0)
    theirs = gap @ gap + np.trace(s1) + np.trace(s2) - 2 * np.trace(linalg.sqrtm(s1 @ s2).real)
    # variances of 32 and 72
    assert fid(*(statistics(torch.from_numpy(z)) for z in (x, y))) == near(theirs, of_matrices(32), scale=100)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streaming_equals_batch(offset):
    x = features(257, 12, 4) + offset
    streamed = statistics(x[:1], x[1:100], x[100:100], x[100:])
    merged = statistics(x[:70])
    merged.merge(statistics(x[70:]))
    merged.merge(GaussianStatistics())
    expected = torch.from_numpy(np.cov(x.numpy(), rowvar=False))
    for got in (streamed, merged):
        assert got.count == 257
        sums = rounding(torch.float64, terms=257)
        assert_close(got.mean, x.mean(0), sums)
        assert_close(got.covariance, expected, sums, scale=x.abs().max().item())  # what is subtracted from x


def test_merging_leaves_the_other_alone():
    a, b = GaussianStatistics(), statistics(features(10, 3, 5))
    before = b.mean.clone()
    a.merge(b)
    a.update(features(10, 3, 6))
    assert b.count == 10
    assert torch.equal(b.mean, before)


def test_statistics_of_several_processes_are_saved_and_merged():
    x = features(90, 5, 7)
    sent = [statistics(part).tensors() for part in (x[:30], x[30:31], x[31:31], x[31:])]
    merged = GaussianStatistics()
    for tensors in sent:
        merged.merge(GaussianStatistics.of_tensors(tensors))
    assert merged.count == 90
    assert_close(merged.mean, x.mean(0), rounding(torch.float64, terms=90))
    expected = torch.from_numpy(np.cov(x.numpy(), rowvar=False))
    assert_close(merged.covariance, expected, rounding(torch.float64, terms=90, steps=2))


def test_what_goes_on_from_saved_statistics_leaves_them_alone():
    kept = statistics(features(10, 3, 5)).tensors()
    before = {name: tensor.clone() for name, tensor in kept.items()}
    again = GaussianStatistics.of_tensors(kept)
    again.update(features(10, 3, 6))
    assert again.count == 20
    assert all(torch.equal(kept[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "change",
    [
        {"count": torch.tensor(-1)},
        {"count": torch.tensor(10.0)},
        {"mean": torch.zeros(4, dtype=torch.float64)},
        {"mean": torch.zeros(3)},
        {"scatter": torch.full((3, 3), math.nan, dtype=torch.float64)},
        {"scatter": torch.zeros(3, 4, dtype=torch.float64)},
    ],
)
def test_damaged_statistics_are_refused(change):
    tensors = statistics(features(10, 3, 5)).tensors()
    with pytest.raises(SprintError, match="compute them again"):
        GaussianStatistics.of_tensors(tensors | change)
    with pytest.raises(SprintError, match="compute them again"):
        GaussianStatistics.of_tensors({name: t for name, t in tensors.items() if name not in change})


def test_half_precision_features_are_summed_in_double():
    x = torch.full((4096, 2), 0.1, dtype=torch.bfloat16)
    got = statistics(x)
    assert got.mean.dtype == torch.float64
    assert got.mean[0].item() == near(x[0, 0].double().item(), rounding(torch.float64, terms=4096))


def test_what_has_no_distance_is_refused_in_one_line():
    with pytest.raises(SprintError, match="NaN or infinite"):
        statistics(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(SprintError, match="1 pictures have no covariance"):
        _ = statistics(torch.ones(1, 3)).covariance
    with pytest.raises(SprintError, match="0 pictures have no covariance"):
        fid(statistics(features(9, 3, 0)), GaussianStatistics())
    with pytest.raises(SprintError, match="features of 3 and of 4 numbers"):
        fid(statistics(features(9, 3, 0)), statistics(features(9, 4, 0)))
