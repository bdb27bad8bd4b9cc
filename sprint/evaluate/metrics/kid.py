"""Kernel distance between two sets of pictures, in whatever feature space the caller chooses.

KID (arXiv 1801.01401): the squared maximum mean discrepancy under the kernel (x·y / D + 1)³. Its estimate has no
bias, unlike FID's, so that sets of different counts compare, and equal distributions come out around 0, at times
below.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sprint.base.errors import SprintError
from sprint.evaluate.metrics.inception import finite


class Kid(NamedTuple):
    """Over the subsets; `std` divides by their count, as torch-fidelity and torchmetrics do."""

    mean: float
    std: float


def kid(
    features_a: Tensor, features_b: Tensor, subset_size: int = 1000, subsets: int = 100, seed: int = 0
) -> Kid:
    """Mean and spread of the distance between random subsets of both sets, in float64.

    features_a, features_b   [N, D] and [M, D], of any float type
    subset_size              pictures of each set in a subset, drawn without replacement; at most N and M

    With a seed the subsets are torch-fidelity's for its `rng_seed` (numpy's RandomState, a first, then b).
    Raises SprintError for sets that are too small, or not finite, or of different lengths D.
    """
    smaller = min(len(features_a), len(features_b))
    if not 2 <= subset_size <= smaller:
        raise SprintError(f"KID: subsets of {subset_size} from {smaller} pictures; give 2 to {smaller}")
    if features_a.shape[1] != features_b.shape[1]:
        raise SprintError(
            f"KID: features of {features_a.shape[1]} and of {features_b.shape[1]} numbers; "
            f"take both from one network"
        )
    sets = [finite(features.detach().cpu(), "KID") for features in (features_a, features_b)]
    draw, distances = np.random.RandomState(seed), []
    for _ in range(subsets):
        chosen = [x[draw.choice(len(x), subset_size, replace=False)].double() for x in sets]
        distances.append(squared_mmd(*chosen))
    return Kid(float(np.mean(distances)), float(np.std(distances)))


def squared_mmd(a_MD: Tensor, b_MD: Tensor) -> float:
    """Unbiased: two sets of the same count M, no picture compared with itself."""
    count = len(a_MD)
    within = sum(kernel.sum() - kernel.trace() for kernel in (_kernel(a_MD, a_MD), _kernel(b_MD, b_MD)))
    across = _kernel(a_MD, b_MD).mean()
    return (within / (count * (count - 1)) - 2 * across).item()


def _kernel(a_MD: Tensor, b_MD: Tensor) -> Tensor:
    return torch.addmm(torch.ones((), dtype=a_MD.dtype), a_MD, b_MD.T, alpha=1 / a_MD.shape[1]).pow_(3)
