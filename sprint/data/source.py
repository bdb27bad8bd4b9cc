"""Where training pictures come from, and how they become batches.

A source is a function of the position: sample number p is always the same sample, whoever asks and however
the run was split or resumed. So a checkpoint holds a step number and no iterator.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch.nn.functional import pad

from sprint.data.batch import Batch, Sample, parts
from sprint.data.scenes import Scene, render, scene
from sprint.errors import SprintError
from sprint.models.family import TEXT_UNIT, Family
from sprint.recipe import Data, DataKind

HELD_OUT_SEED = 2000  # the series of scenes that scores are taken on; never trained on
TRAINING_SEED = 3000  # data.seed = s trains on series 3000 + s

SHOWN = 12  # held-out pictures on a page: two of each category

T = TypeVar("T")


class Source(Protocol):
    """Endless captioned pictures of one size."""

    def samples(self, positions: range) -> list[Sample]:
        """The samples at these positions, which determine them alone. Raises `SprintError` on bad files."""


def open_source(data: Data) -> Source:
    """The source that a recipe names. Raises `SprintError` where its folder cannot be used."""
    from sprint.data.folder import FolderSource  # it gives this file's samples

    if data.kind is DataKind.scenes:
        return SceneSource(data.seed)
    return FolderSource(data.path, data.size, data.seed)


@dataclass(frozen=True)
class SceneSource:
    """The built-in scenes; position = index in the series. `seed` ≥ 0 picks one of the training series."""

    seed: int = 0

    def __post_init__(self):
        if self.seed < 0:
            raise SprintError(f"data.seed = {self.seed}, but it must be at least 0")

    def samples(self, positions: range) -> list[Sample]:
        scenes = (scene(TRAINING_SEED + self.seed, position) for position in positions)
        return [Sample(render(s.things), s.caption) for s in scenes]


def held_out_scenes(count: int) -> list[Scene]:
    """The first `count` scenes of the series that is never trained on; categories take turns."""
    return [scene(HELD_OUT_SEED, i) for i in range(count)]


def batch_positions(step: int, batch_size: int, rank: int = 0, processes: int = 1) -> range:
    """The positions of batch number `step` that fall to process `rank`: consecutive, in order of rank.

    batch_size    over all processes; raises `SprintError` unless they share it evenly
    """
    share, rest = divmod(batch_size, processes)
    if rest:
        raise SprintError(f"batch_size = {batch_size} cannot be shared evenly by {processes} processes")
    first = step * batch_size + rank * share
    return range(first, first + share)


def encode(samples: list[Sample], family: Family, largest: int = 0, unit: int = TEXT_UNIT) -> Batch:
    """Pictures and captions through the frozen family, at most `largest` at a time (0: all).

    unit   the text's length is a multiple of it that holds the longest caption, or the family's longest

    -> tensors on the family's device.  Raises `SprintError` if the autoencoder cannot divide the pictures
    into latent cells.
    """
    pictures = np.stack([sample.picture for sample in samples])
    size, cell = pictures.shape[1], family.downscale
    if size % cell:
        raise SprintError(f"data.size = {size}, but this autoencoder takes multiples of {cell} pixels")
    captions = [sample.caption for sample in samples]
    divided = list(parts(len(samples), largest))
    latents = [family.encode_pictures(pictures[part]) for part in divided]
    texts = [family.encode_trimmed(captions[part], unit) for part in divided]
    longest = max(mask.shape[1] for _, mask in texts)
    return Batch(
        torch.cat(latents),
        torch.cat([pad(text, (0, 0, 0, longest - text.shape[1])) for text, _ in texts]),
        torch.cat([pad(mask, (0, longest - mask.shape[1])) for _, mask in texts]),
    )


def prefetch(make: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Iterator[T]:
    """Yield make(start), …, make(stop − 1) in order, each made by one thread up to `depth` ≥ 1 items early.

    What `make` raises is raised here in its turn, after the items before it. Closing the iterator, or
    leaving it by an exception, drops what is queued and waits for the item in the making. Wrap it in
    `contextlib.closing` to be sure of that. Autocast and grad mode are per thread: `make` sees the defaults.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        steps = iter(range(start, stop))
        ahead = deque(pool.submit(make, step) for step in islice(steps, depth))
        while ahead:
            item = ahead.popleft().result()
            ahead.extend(pool.submit(make, step) for step in islice(steps, 1))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
