"""FID and KID as metrics of `sprint evaluate`: which network, which real pictures, at which size."""

from itertools import islice

import numpy as np
import torch
from torch import Tensor

from sprint.data.scenes import SIZE, render, scene
from sprint.errors import NotHereError
from sprint.evaluate.columns import REFERENCE_SCENES, REFERENCE_SEED
from sprint.evaluate.features import FeatureNetwork, inception
from sprint.evaluate.fid import GaussianStatistics, fid
from sprint.evaluate.kid import kid
from sprint.evaluate.metrics import AT_ONCE, Choices, Drawn
from sprint.evaluate.prompts import SCENES, Prompts, needed
from sprint.evaluate.reference import RealStatistics, features_of, open_reference
from sprint.evaluate.result import Figure, Measured
from sprint.evaluate.scene_features import scene_features
from sprint.evaluate.store import progress

KID_SUBSET = 1000  # pictures, or as many as there are
MJHQ_SIZE = 256  # pixels: pictures of both sets are brought to this first


class FrechetDistance:
    """FID and KID against real pictures: of scenes by a network of our own, of all others by Inception."""

    name = "fid"

    def __init__(self, choices: Choices, prompts: Prompts | None):
        self.choices, self.prompts = choices, prompts
        self.scenes = prompts is not None and prompts.name == SCENES and choices.reference is None
        self.size = SIZE if self.scenes else None
        self.real: Tensor | None = None  # features, once they are needed

    def find(self) -> Prompts:
        if self.choices.reference is None and not self.scenes:
            needed(self.prompts)
            raise NotHereError(
                "no real pictures to compare with: give --reference with a folder or statistics"
            )
        return needed(self.prompts)

    def open(self) -> None:
        if self.scenes:
            self.network, self.against = (
                scene_features(self.choices.device),
                f"{REFERENCE_SCENES} other real scenes",
            )
            return
        self.network = inception(self.choices.inception_weights, self.choices.device)
        self.reference = open_reference(self.choices.reference)
        if isinstance(self.reference, RealStatistics):
            self.reference.check(self.network.name, MJHQ_SIZE)
            self.against = f"statistics in {self.choices.reference}"
        else:
            self.against = f"{len(self.reference)} real pictures in {self.choices.reference}"

    def protocol(self) -> dict[str, str]:
        return {
            "pictures": self.prompts.words,
            "against": self.against,
            "network": self.network.name,
            "resize": "none" if self.scenes else f"both sets to {MJHQ_SIZE} px first, centre cut out",
            "KID": f"subsets of at most {KID_SUBSET}; ± is the deviation between subsets",
        }

    def measure(self, drawn: Drawn) -> Measured:
        features = self._features(drawn)
        if not self.scenes and isinstance(self.reference, RealStatistics):
            return Measured({"FID": Figure(fid(statistics(features), self.reference), higher=False)})
        if self.real is None:
            self.real = self._real_features()
        distance = kid(features, self.real, subset_size=min(KID_SUBSET, len(features), len(self.real)))
        name, scale = ("KID", 1) if self.scenes else ("KID × 1000", 1000)  # as the field prints Inception's
        return Measured(
            {
                "FID": Figure(fid(statistics(features), statistics(self.real)), higher=False),
                name: Figure(scale * distance.mean, scale * distance.std, higher=False, spec=".2f"),
            }
        )

    def _features(self, drawn: Drawn) -> Tensor:
        if self.scenes:
            return torch.cat([self.network(batch) for batch in drawn.batches("FID")])
        return features_of(drawn.files, self.network, MJHQ_SIZE, self.choices.kept / drawn.store.folder.name)

    def _real_features(self) -> Tensor:
        if self.scenes:
            return real_scene_features(self.network)
        files = [picture.path for picture in self.reference]
        return features_of(files, self.network, MJHQ_SIZE, self.choices.kept / "real")


def real_scene_features(network: FeatureNetwork) -> Tensor:
    """Of the real scenes that runs are scored against  -> [REFERENCE_SCENES, D]"""
    pictures = (render(scene(REFERENCE_SEED, i).things) for i in range(REFERENCE_SCENES))
    parts = []
    with progress("real scenes", REFERENCE_SCENES) as bar:
        while batch := list(islice(pictures, AT_ONCE)):
            parts.append(network(np.stack(batch)))
            bar.update(len(batch))
    return torch.cat(parts)


def statistics(features: Tensor) -> GaussianStatistics:
    """Features [N, D] -> mean and covariance, taken in float64 a part at a time."""
    whole = GaussianStatistics()
    for part in features.split(KID_SUBSET):
        whole.update(part)
    return whole
