"""Real scenes to measure drawn ones against."""

from itertools import islice

import numpy as np
import torch
from torch import Tensor

from sprint.base.progress import progress
from sprint.evaluate.metrics.gaussian import GaussianStatistics, fid
from sprint.evaluate.metrics.inception import FeatureNetwork
from sprint.lab.scenes import render, scene
from sprint.lab.series import FLOOR_SEED, REFERENCE_SEED

REFERENCE_SCENES = 3000  # real pictures behind FID
IN_ONE_CALL = 100  # pictures in one call of a feature network


def real_scene_features(
    network: FeatureNetwork, count: int = REFERENCE_SCENES, seed: int = REFERENCE_SEED
) -> Tensor:
    """Of the first real scenes of a series that nobody trained on  -> [count, D]"""
    pictures = (render(scene(seed, i).things) for i in range(count))
    parts = []
    with progress("real scenes", count) as bar:
        while batch := list(islice(pictures, IN_ONE_CALL)):
            parts.append(network(np.stack(batch)))
            bar.update(len(batch))
    return torch.cat(parts)


def real_statistics(
    network: FeatureNetwork, count: int = REFERENCE_SCENES, seed: int = REFERENCE_SEED
) -> GaussianStatistics:
    """Of `real_scene_features`: what runs are scored against, or another set like it."""
    return GaussianStatistics.of(real_scene_features(network, count, seed))


def real_floor(network: FeatureNetwork, real: GaussianStatistics, count: int) -> float:
    """FID of `count` other real scenes: what a perfect generator would score."""
    return fid(real_statistics(network, count, FLOOR_SEED), real)
