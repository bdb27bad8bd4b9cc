"""Teacher and student on the same held-out prompts and seeds: pictures, scores, FID, seconds.

FID compares pictures with real scenes in the features of a network of our own (`scene_features`).
"""

import io
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sprint.base.files import write_whole
from sprint.evaluate.metrics.gaussian import GaussianStatistics, fid
from sprint.evaluate.metrics.inception import FeatureNetwork
from sprint.lab.reader import score
from sprint.lab.scenes import Scene
from sprint.lab.series import SHOWN
from sprint.sample.generate import Generator
from sprint.train.report.report import Column, Role, Scores


def batches(scenes: list[Scene], size: int) -> Iterator[list[Scene]]:
    for start in range(0, len(scenes), size):
        yield scenes[start : start + size]


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
