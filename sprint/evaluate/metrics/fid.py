"""FID and KID as metrics of `sprint evaluate`: which network, which real pictures, at which size."""

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from sprint.base.errors import NotHereError
from sprint.evaluate.metrics.gaussian import GaussianStatistics, fid
from sprint.evaluate.metrics.inception import FeatureNetwork, inception
from sprint.evaluate.metrics.kid import kid
from sprint.evaluate.metrics.metric import Choices, Drawn
from sprint.evaluate.metrics.real import RealStatistics, features_of, open_reference, save_statistics
from sprint.evaluate.metrics.real_scenes import REFERENCE_SCENES, real_floor, real_scene_features
from sprint.evaluate.metrics.registry import FID
from sprint.evaluate.prompts import SCENES, Prompts, needed
from sprint.evaluate.result import KEY_DIGITS, Figure, Measured
from sprint.lab.features import scene_features
from sprint.lab.scenes import SIZE

KID_SUBSET = 1000  # pictures, or as many as there are
KID_SUBSETS = 100
MJHQ_SIZE = 256  # pixels: pictures of both sets are brought to this first
STATISTICS = "statistics.safetensors"  # beside the features of real pictures: fit for --reference


def picture_network(choices: Choices, scenes: bool) -> FeatureNetwork:
    """What sees pictures: scenes a network of our own, all others Inception. Raises NotHereError without weights."""
    return scene_features(choices.device) if scenes else inception(choices.inception_weights, choices.device)


def drawn_features(network: FeatureNetwork, drawn: Drawn, scenes: bool, kept: Path) -> Tensor:
    """What it sees of a set, [N, D]; of other pictures than scenes it is kept in a folder below `kept`."""
    if scenes:
        return torch.cat([network(batch) for batch in drawn.batches("FID")])
    return features_of(drawn.files, network, MJHQ_SIZE, kept / drawn.store.folder.name)


class FrechetDistance:
    """FID and KID against real pictures: of scenes by a network of our own, of all others by Inception."""

    metric = FID

    def __init__(self, choices: Choices, prompts: Prompts | NotHereError):
        self.choices, self.prompts = choices, prompts
        self.scenes = isinstance(prompts, Prompts) and prompts.name == SCENES and choices.reference is None
        self.size = SIZE if self.scenes else None
        self.reference: list[Path] | RealStatistics | None = None  # of scenes: none, they are made
        self.real: Tensor | None = None  # features, once they are needed, with their `statistics`
        self.floor: float | None = None  # FID that a perfect generator of scenes would have

    def find(self) -> Prompts:
        if self.choices.reference is None and not self.scenes:
            needed(self.prompts)
            raise NotHereError(
                "no real pictures to compare with: give --reference with a folder or statistics"
            )
        return needed(self.prompts)

    def open(self) -> None:
        self.network = picture_network(self.choices, self.scenes)
        if self.scenes:
            return
        found = open_reference(self.choices.reference)
        if isinstance(found, RealStatistics):
            found.check(self.network.name, MJHQ_SIZE)
            self.reference = found
        else:
            self.reference = [picture.path for picture in found]

    def protocol(self) -> dict[str, str]:
        facts = {"pictures": self.prompts.words, "network": self.network.name}
        if isinstance(self.reference, RealStatistics):
            size = self.reference.size
            theirs = (
                "does not say theirs" if size is None else f"says {size} px" if size else "says not resized"
            )
            resize = f"ours to {MJHQ_SIZE} px first, centre cut out; the file of statistics {theirs}"
            return facts | {"against": f"statistics in {self.choices.reference}", "resize": resize}
        count, subset = self._real_count, self._subset
        if self.scenes:
            facts |= {"against": f"{count} other real scenes", "resize": "none"}
            if self.floor is not None:
                facts["floor"] = f"as many real scenes again have an FID of {self.floor:.3f}"
        else:
            facts["against"] = f"{count} real pictures in {self.choices.reference}"
            facts["resize"] = f"both sets to {MJHQ_SIZE} px first, centre cut out"
        if self._whole:
            return facts | {"KID": f"of all {subset} pictures of each set"}
        return facts | {
            "KID": f"{KID_SUBSETS} subsets of {subset} pictures; ± is the deviation between subsets, no standard error"
        }

    @property
    def _real_count(self) -> int:
        return REFERENCE_SCENES if self.scenes else len(self.reference)

    @property
    def _subset(self) -> int:
        """Pictures of each set in a subset of KID."""
        return min(KID_SUBSET, len(self.prompts.shots), self._real_count)

    @property
    def _whole(self) -> bool:
        """Whether every subset is all of both sets, so that they do not differ."""
        return self._subset == len(self.prompts.shots) == self._real_count

    def measure(self, drawn: Drawn) -> Measured:
        features = drawn_features(self.network, drawn, self.scenes, self.choices.kept)
        ours = GaussianStatistics.of(features)
        if isinstance(self.reference, RealStatistics):
            return Measured({"FID": self.metric.figure(fid(ours, self.reference))})
        if self.real is None:
            self.real = self._real_features()
            self.statistics = GaussianStatistics.of(self.real)
            if self.scenes:
                self.floor = real_floor(self.network, self.statistics, len(features))
        name, scale = ("KID", 1) if self.scenes else ("KID × 1000", 1000)  # as the field prints Inception's
        distance = kid(features, self.real, self._subset, 1 if self._whole else KID_SUBSETS)
        error = None if self._whole else scale * distance.std
        spec = ".3g" if self.scenes else ".2f"
        return Measured(
            {
                "FID": self.metric.figure(fid(ours, self.statistics)),
                name: Figure(scale * distance.mean, error, self.metric.higher, spec),
            }
        )

    def _real_features(self) -> Tensor:
        """Of every model's evaluation the same, so they are kept in one place, with their statistics."""
        if self.scenes:
            return real_scene_features(self.network, REFERENCE_SCENES)
        facts = [self.network.name, MJHQ_SIZE, [os.path.abspath(file) for file in self.reference]]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:KEY_DIGITS]
        folder = self.choices.kept_real / key
        features = features_of(self.reference, self.network, MJHQ_SIZE, folder)
        save_statistics(folder / STATISTICS, GaussianStatistics.of(features), self.network.name, MJHQ_SIZE)
        return features
