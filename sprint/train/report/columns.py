"""Teacher and student on the same held-out prompts and seeds: pictures, scores, FID, seconds.

FID compares pictures with real scenes in the features of a network of our own (`scene_features`).
"""

import io
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sprint.base.files import write_whole
from sprint.data.source import HELD_OUT_SEED, SHOWN
from sprint.evaluate.metrics.gaussian import GaussianStatistics, fid
from sprint.evaluate.metrics.inception import FeatureNetwork
from sprint.evaluate.store import progress
from sprint.lab.reader import score
from sprint.lab.scenes import Scene, render, scene
from sprint.sample.generate import Generator
from sprint.train.report.report import Column, Role, Scores

REFERENCE_SCENES = 3000  # real pictures behind FID
REFERENCE_SEED = HELD_OUT_SEED + 1
AT_ONCE = 100  # pictures in one call of a feature network


def batches(scenes: list[Scene], size: int) -> Iterator[list[Scene]]:
    for start in range(0, len(scenes), size):
        yield scenes[start : start + size]


def real_scene_features(
    network: FeatureNetwork, count: int = REFERENCE_SCENES, seed: int = REFERENCE_SEED
) -> Tensor:
    """Of the first real scenes of a series that nobody trained on  -> [count, D]"""
    pictures = (render(scene(seed, i).things) for i in range(count))
    parts = []
    with progress("real scenes", count) as bar:
        while batch := list(islice(pictures, AT_ONCE)):
            parts.append(network(np.stack(batch)))
            bar.update(len(batch))
    return torch.cat(parts)


def real_statistics(
    network: FeatureNetwork, count: int = REFERENCE_SCENES, seed: int = REFERENCE_SEED
) -> GaussianStatistics:
    """Of `real_scene_features`: what runs are scored against, or another set like it."""
    return GaussianStatistics.of(real_scene_features(network, count, seed))


def draw_column(
    generator: Generator, role: Role, steps: int, scenes: list[Scene], guidance_scale: float, batch_size: int
) -> tuple[np.ndarray, float]:
    """Pictures of every scene's caption, seed = its index.  -> uint8 [N, H, W, 3], seconds per picture"""
    pictures, seconds, seed = [], 0.0, 0
    bar = tqdm(total=len(scenes), desc=f"drawing {role.value}, {steps} step{'s' * (steps > 1)}", leave=False)
    for part in batches(scenes, batch_size):
        captions = [s.caption for s in part]
        seeds = list(range(seed, seed + len(part)))
        began = time.perf_counter()
        pictures.append(generator.pictures(captions, seeds, steps, guidance_scale))
        seconds += time.perf_counter() - began
        seed += len(part)
        bar.update(len(part))
    bar.close()
    return np.concatenate(pictures), seconds / len(scenes)


def evaluate_column(
    generator: Generator,
    role: Role,
    steps: int,
    scenes: list[Scene],
    network: FeatureNetwork,
    real: GaussianStatistics,
    guidance_scale: float,
    batch_size: int,
) -> Column:
    """One column of the report."""
    pictures, seconds = draw_column(generator, role, steps, scenes, guidance_scale, batch_size)
    result = score(pictures, [s.claim for s in scenes])
    return Column(
        role=role,
        steps=steps,
        seconds_per_picture=seconds,
        scores=Scores(
            result["mean_over_samples"], {name: row["share"] for name, row in result["categories"].items()}
        ),
        fid=fid(GaussianStatistics.of(network(pictures)), real),
        pictures=list(pictures[:SHOWN]),
    )


# ---- kept between runs of the same command --------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """What a column's pictures and figures came from.

    model     SHA-256 of weights and text settings
    times     TrigFlow times in radians
    network   name of the one behind FID
    """

    model: str
    times: tuple[float, ...]
    network: str

    def plain(self) -> dict:
        return asdict(self) | {"times": list(self.times)}


def save_column(column: Column, folder: Path, origin: Origin) -> None:
    """Numbers as JSON, pictures in one .npz; the JSON is written last."""
    packed = io.BytesIO()
    np.savez_compressed(packed, pictures=np.stack(column.pictures))
    (folder / f"{column.key}.json").unlink(missing_ok=True)  # of other pictures
    write_whole(folder / f"{column.key}.npz", packed.getvalue())
    numbers = {
        "origin": origin.plain(),
        "seconds_per_picture": column.seconds_per_picture,
        "overall": column.scores.overall,
        "categories": dict(column.scores.categories),
        "fid": column.fid,
    }
    write_whole(folder / f"{column.key}.json", json.dumps(numbers, indent=1))


def load_column(role: Role, steps: int, folder: Path, origin: Origin) -> Column | None:
    """What `save_column` kept; None if it is not there, or came from something else."""
    empty = Column(role, steps)
    numbers_file = folder / f"{empty.key}.json"
    if not numbers_file.exists():
        return None
    numbers = json.loads(numbers_file.read_text())
    if numbers.get("origin") != origin.plain():
        return None
    with np.load(folder / f"{empty.key}.npz") as saved:
        pictures = list(saved["pictures"])
    return Column(
        role,
        steps,
        numbers["seconds_per_picture"],
        Scores(numbers["overall"], numbers["categories"]),
        numbers["fid"],
        pictures,
    )


def real_floor(network: FeatureNetwork, real: GaussianStatistics, count: int) -> float:
    """FID of `count` other real scenes: what a perfect generator would score."""
    return fid(real_statistics(network, count, REFERENCE_SEED + 1), real)
