"""FID against closed forms of Gaussians, and the streaming statistics against numpy."""

import math

import numpy as np
import pytest
import torch

from sprint.data.scenes import render, scene
from sprint.errors import SprintError
from sprint.evaluate.fid import GaussianStatistics, autoencoder_features, fid, frechet_distance


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
    assert distance == pytest.approx(18.0, abs=1e-12)


def test_diagonal_covariances_add_up_by_axis():
    s1, s2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, 3.0])
    mean = torch.tensor([0.0, 1.0, -1.0])
    # means are equal: (1 − 2)² + (2 − 0.5)² + 0 = 3.25
    distance = frechet_distance(mean, s1.square().diag(), mean, s2.square().diag())
    assert distance == pytest.approx(3.25, abs=1e-12)


def test_a_common_rotation_changes_nothing():
    q = rotation(3, 0)
    s1, s2 = (torch.tensor(s, dtype=torch.float64) for s in ([1.0, 2.0, 3.0], [2.0, 0.5, 3.0]))
    mean = torch.zeros(3, dtype=torch.float64)
    gap = torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)
    turn = lambda s: q @ s.square().diag() @ q.T  # noqa: E731
    assert frechet_distance(mean, turn(s1), q @ gap, turn(s2)) == pytest.approx(3.25 + 4.0, abs=1e-11)


def test_covariances_that_do_not_commute():
    # 2×2: tr √(AB) = √(tr AB + 2 √det AB)
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    ab = a @ b
    expected = (a.trace() + b.trace() - 2 * torch.sqrt(ab.trace() + 2 * ab.det().sqrt())).item()
    assert expected > 1.5
    assert frechet_distance(zero, a, zero, b) == pytest.approx(expected, abs=1e-11)


def test_singular_covariances():
    # A point and a line: the line's variance, 9, plus the gap, 16.
    point, line = torch.zeros(2, 2), torch.tensor([[9.0, 0.0], [0.0, 0.0]])
    gap = torch.tensor([0.0, 4.0])
    assert frechet_distance(torch.zeros(2), point, gap, line) == pytest.approx(25.0, abs=1e-12)
    # Fewer samples than dimensions.
    few = statistics(features(5, 40, 1))
    assert fid(few, few) == pytest.approx(0.0, abs=1e-6)


def test_zero_for_equal_sets_and_symmetric():
    a, b = statistics(features(300, 20, 1)), statistics(1.5 * features(300, 20, 2, shift=0.3))
    assert fid(a, a) == pytest.approx(0.0, abs=1e-10)
    assert fid(a, b) == pytest.approx(fid(b, a), rel=1e-11)
    assert fid(a, b) > 20 * (0.4**2)


def test_shifting_a_set_costs_the_squared_shift():
    x = features(500, 16, 3)
    assert fid(statistics(x), statistics(x + 0.5)) == pytest.approx(16 * 0.25, abs=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streaming_equals_batch(offset):
    x = features(257, 12, 4) + offset
    streamed = statistics(x[:1], x[1:100], x[100:100], x[100:])
    merged = statistics(x[:70])
    merged.merge(statistics(x[70:]))
    merged.merge(GaussianStatistics())
    expected = np.cov(x.numpy(), rowvar=False)
    for got in (streamed, merged):
        assert got.count == 257
        np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(got.covariance, expected, atol=1e-8 if offset else 1e-13)


def test_merging_leaves_the_other_alone():
    a, b = GaussianStatistics(), statistics(features(10, 3, 5))
    before = b.mean.clone()
    a.merge(b)
    a.update(features(10, 3, 6))
    assert b.count == 10
    assert torch.equal(b.mean, before)


def test_half_precision_features_are_summed_in_double():
    x = torch.full((4096, 2), 0.1, dtype=torch.bfloat16)
    got = statistics(x)
    assert got.mean.dtype == torch.float64
    assert got.mean[0].item() == pytest.approx(x[0, 0].double().item(), rel=1e-14)


def test_what_has_no_distance_is_refused_in_one_line():
    with pytest.raises(SprintError, match="NaN or infinite"):
        statistics(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(SprintError, match="1 pictures have no covariance"):
        _ = statistics(torch.ones(1, 3)).covariance


def test_features_are_quarter_means_and_a_deviation():
    latents = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    got = autoencoder_features(latents)
    assert got.shape == (2, 15)
    assert got[0, :4].tolist() == [2.5, 4.5, 10.5, 12.5]  # of 0 … 15 in rows of four
    assert got[1, 11].item() == (90 + 91 + 94 + 95) / 4
    assert got[0, 12].item() == pytest.approx(math.sqrt(16 * 17 / 12), rel=1e-6)  # of 16 numbers in a row


def encode(pictures):
    """A stand-in for the autoencoder: a fixed linear map of 8×8 patches to 8 channels."""
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    basis = torch.linalg.qr(torch.randn(192, 8, generator=generator(0)))[0]
    patches = torch.nn.functional.pixel_unshuffle(x, 8)
    return torch.einsum("bphw,pc->bchw", patches, basis)


def of_pictures(pictures):
    return statistics(autoencoder_features(encode(pictures)))


def missing(scenes, share):
    rng = np.random.default_rng(0)
    return [render(tuple(t for t in s.things if rng.random() > share)) for s in scenes]


def dulled(scenes, share):
    pictures = [render(s.things).astype(float) for s in scenes]
    return [p * (1 - share) + share * p.mean(-1, keepdims=True) for p in pictures]


def shifted(scenes, share):
    return [np.roll(render(s.things), int(20 * share), axis=1) for s in scenes]


@pytest.mark.parametrize("damage", [missing, dulled, shifted])
def test_damage_raises_the_distance_step_by_step(damage):
    scenes = [scene(3, i) for i in range(1200)]
    reference = of_pictures([render(s.things) for s in scenes[:600]])
    floor = fid(reference, of_pictures([render(s.things) for s in scenes[600:]]))
    distances = [fid(reference, of_pictures(damage(scenes[600:], share))) for share in (0.2, 0.4, 0.8)]
    assert 2 * floor < distances[0]
    assert 2 * distances[0] < distances[1]
    assert 2 * distances[1] < distances[2]
