"""Diversity over seeds: how far apart pictures of one prompt are that differ in their seed alone.

No paper on few-step models reports it, and neither a score nor FID of one picture a prompt sees a model that has
learned a single picture for each prompt.
"""

import math
from collections.abc import Callable, Iterable
from itertools import count
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor

from sprint.base.errors import NotHereError
from sprint.evaluate.metrics.metric import Choices, Drawn
from sprint.evaluate.metrics.registry import DIVERSITY
from sprint.evaluate.prompts import SCENES, Prompts, needed, spread
from sprint.evaluate.result import Measured
from sprint.lab.features import scene_features
from sprint.lab.scenes import CATEGORIES, SIZE, Claim, render, scene
from sprint.lab.series import FLOOR_SEED, held_out_scenes

SET = "diversity"  # name of the set
PROMPTS, SEEDS = 24, 4  # the first seed is that of the prompt's own picture, which other metrics draw as well
NEXT_SEED = 10_000_000  # between a prompt's seeds, above any number of pictures in a set


def seeds_of(prompts: Prompts) -> Prompts:
    """Of a set some prompts, evenly, each with several seeds one after another: no more pictures than the set has."""
    wanted = max(1, min(PROMPTS, len(prompts.shots) // SEEDS))
    scenes = prompts.name == SCENES  # their categories take turns: the first ones have as many of each
    chosen = range(min(wanted, len(prompts.shots))) if scenes else spread(len(prompts.shots), wanted)
    shots = [
        shot._replace(seed=shot.seed + k * NEXT_SEED)
        for shot in (prompts.shots[i] for i in chosen)
        for k in range(SEEDS)
    ]
    return Prompts(SET, f"{len(chosen)} prompts, {SEEDS} seeds of each", shots)


def mean_distances(features: Tensor, seeds: int = SEEDS) -> list[float]:
    """Of each prompt the mean Euclidean distance of its pictures, over all pairs.

    features   [P · seeds, D], pictures of a prompt one after another
    """
    groups = features.double().unflatten(0, (-1, seeds))
    return [torch.pdist(group).mean().item() for group in groups]


class SeedDiversity:
    """Mean distance between pictures of a prompt that differ in their seed: in the scene network, or in CLIP."""

    metric = DIVERSITY

    def __init__(self, choices: Choices, prompts: Prompts | NotHereError):
        self.choices, self.prompts = choices, prompts
        self.scenes = isinstance(prompts, Prompts) and prompts.name == SCENES
        self.size = SIZE if self.scenes else None
        self.real: float | None = None  # of real scenes, once it is known

    def find(self) -> Prompts:
        self.set = seeds_of(needed(self.prompts))
        return self.set

    def open(self) -> None:
        self.see, self.network = (self._scene_network if self.scenes else self._clip)()

    def _scene_network(self) -> tuple[Callable[[np.ndarray], Tensor], str]:
        network = scene_features(self.choices.device)
        return network, network.name

    def _clip(self) -> tuple[Callable[[np.ndarray], Tensor], str]:
        from sprint.evaluate.metrics.clip import embed_pictures, load_clip, wanted_clip

        clip = load_clip(wanted_clip(self.choices), self.choices.device)
        return lambda pictures: embed_pictures(clip, pictures), f"{clip.name}, unit vectors"

    def protocol(self) -> dict[str, str]:
        facts = {
            "pictures": self.set.words,
            "network": self.network,
            "figure": "Euclidean distance of two pictures of a prompt, over all pairs, then over prompts",
            "error": "± is the standard error of the mean over prompts",
        }
        if self.real is not None:
            facts["real"] = f"real scenes of the same captions are {self.real:.3f} apart"
        return facts

    def measure(self, drawn: Drawn) -> Measured:
        features = torch.cat([self.see(batch) for batch in drawn.batches("diversity")])
        distances = mean_distances(features)
        if self.scenes and self.real is None:
            self.real = fmean(mean_distances(torch.cat(list(map(self.see, real_pictures(len(distances)))))))
        error = stdev(distances) / math.sqrt(len(distances)) if len(distances) > 1 else None
        return Measured({"diversity over seeds": self.metric.figure(fmean(distances), error)})


def real_pictures(prompts: int, seeds: int = SEEDS) -> Iterable[np.ndarray]:
    """Of each of the first held-out captions other real scenes whose captions claim the same.

    -> for each caption uint8 [seeds, 64, 64, 3]
    """
    claims = [s.claim for s in held_out_scenes(prompts)]
    found = {claim: things for name in CATEGORIES for claim, things in _scenes_of(name, claims, seeds)}
    for claim in claims:
        yield np.stack([render(things) for things in found[claim]])


def _scenes_of(category: str, claims: Iterable[Claim], seeds: int) -> Iterable[tuple[Claim, list]]:
    """The objects of the first so many scenes of each claim of a category."""
    found: dict[Claim, list] = {claim: [] for claim in claims if claim.category == category}
    for i in count():
        if all(len(things) == seeds for things in found.values()):
            return found.items()
        one = scene(FLOOR_SEED, i, category)
        if len(found.get(one.claim, range(seeds))) < seeds:
            found[one.claim].append(one.things)
