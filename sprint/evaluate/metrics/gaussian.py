"""Fréchet distance between two sets of pictures, in whatever feature space the caller chooses.

FID (arXiv 1706.08500) fits a Gaussian to each set's features and measures how far apart the two are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sprint.base.errors import SprintError
from sprint.evaluate.metrics.inception import finite

FEATURES_AT_ONCE = 1000  # features that are taken to float64 at once


class Gaussian(Protocol):
    """What FID needs of a set of pictures, however it came about. Both float64, on the CPU."""

    @property
    def mean(self) -> Tensor: ...  # [D]

    @property
    def covariance(self) -> Tensor: ...  # [D, D]


@dataclass
class GaussianStatistics:
    """Mean [D] and covariance [D, D] of features that arrive in batches; float64, on the CPU.

    Batches and whole statistics are joined by the pairwise update of Chan, Golub and LeVeque (1979),
    so the order does not matter and nothing cancels.
    """

    count: int = 0
    mean: Tensor | None = None
    scatter: Tensor | None = None  # Σ (x − mean)(x − mean)ᵀ

    def update(self, features_BD: Tensor) -> None:
        """Adds a batch [B, D] of any float type. Raises SprintError where a feature is not finite."""
        x = finite(features_BD, "FID").detach().to("cpu", torch.float64)
        if len(x):
            mean = x.mean(0)
            self.merge(GaussianStatistics(len(x), mean, (x - mean).T @ (x - mean)))

    @classmethod
    def of(cls, features_ND: Tensor) -> "GaussianStatistics":
        """Of one set of features. Raises SprintError as `update`."""
        whole = cls()
        for part in features_ND.split(FEATURES_AT_ONCE):
            whole.update(part)
        return whole

    def merge(self, other: "GaussianStatistics") -> None:
        """Adds another set's statistics; the other is left as it is."""
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self.scatter = other.count, other.mean.clone(), other.scatter.clone()
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        weight = self.count * other.count / total
        self.scatter = self.scatter + other.scatter + weight * torch.outer(delta, delta)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D]. Raises SprintError with fewer than two samples."""
        if self.count < 2:
            raise SprintError(f"FID: {self.count} pictures have no covariance; give at least 2")
        return self.scatter / (self.count - 1)

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, to be saved or sent to another process: count [], mean [D], scatter [D, D]."""
        count = {"count": torch.tensor(self.count)}
        return count | ({"mean": self.mean, "scatter": self.scatter} if self.count else {})

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "GaussianStatistics":
        """What `tensors` gave. Raises SprintError for anything else."""
        count = tensors.get("count")
        if count is not None and count.dtype == torch.int64 and count.ndim == 0:
            if count == 0:
                return cls()
            mean, scatter = tensors.get("mean"), tensors.get("scatter")
            if count > 0 and _fit_together(mean, scatter):
                return cls(count.item(), mean.clone(), scatter.clone())
        raise SprintError(
            "statistics: expected finite count [] int64, mean [D] and scatter [D, D] float64; compute them again"
        )


def fid(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance between two sets of features. Raises SprintError where they have not the same length."""
    cov_a, cov_b = a.covariance, b.covariance
    if len(cov_a) != len(cov_b):
        raise SprintError(
            f"FID: features of {len(cov_a)} and of {len(cov_b)} numbers; take both from one network"
        )
    return frechet_distance(a.mean, cov_a, b.mean, cov_b)


def resampled_fid(features: Tensor, real: Gaussian, resamples: int) -> list[float]:
    """FID of sets of as many rows of `features` [N, D], drawn with replacement (bootstrap).  -> [resamples]

    Their standard deviation is FID's standard error. The rows depend on N alone, so that the lists of two ways of
    drawing the same pictures can be compared set by set.
    """
    draw = torch.Generator().manual_seed(0)
    sets = (torch.randint(len(features), (len(features),), generator=draw) for _ in range(resamples))
    return [fid(GaussianStatistics.of(features[rows]), real) for rows in sets]


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½): the squared 2-Wasserstein distance of two Gaussians.

    Means [D], covariances [D, D]. Every root is of a symmetric matrix, so singular covariances do no harm.
    """
    mean_1, cov_1, mean_2, cov_2 = (t.to("cpu", torch.float64) for t in (mean_1, cov_1, mean_2, cov_2))
    root = _symmetric_root(cov_1)
    product = root @ cov_2 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    return max(0.0, distance.item())  # equal sets: rounding may leave −1e-15


def _symmetric_root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric positive semi-definite matrix; negative rounding errors become 0."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _fit_together(mean: Tensor | None, square: Tensor | None) -> bool:
    """Whether they are a finite float64 vector [D] and matrix [D, D]."""
    if mean is None or square is None or {mean.dtype, square.dtype} != {torch.float64}:
        return False
    shapes_fit = mean.ndim == 1 and square.shape == (len(mean), len(mean))
    return shapes_fit and bool(mean.isfinite().all() and square.isfinite().all())
