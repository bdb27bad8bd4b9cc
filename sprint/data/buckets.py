"""Aspect buckets: pictures keep about their aspect, and every batch holds pictures of one shape."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from diffusers.pipelines.sana.pipeline_sana import (
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
    ASPECT_RATIO_2048_BIN,
    ASPECT_RATIO_4096_BIN,
)
from tqdm import tqdm

from sprint.base.errors import SprintError
from sprint.data.bad import BadSamples
from sprint.data.batch import parts
from sprint.data.items import BadSample, Items
from sprint.data.pictures import Shape, nearest
from sprint.recipe.schema import Data

log = logging.getLogger(__name__)
SANA = {
    512: ASPECT_RATIO_512_BIN,
    1024: ASPECT_RATIO_1024_BIN,
    2048: ASPECT_RATIO_2048_BIN,
    4096: ASPECT_RATIO_4096_BIN,
}
CELL = 32  # pixels that Sana's autoencoder makes one latent cell, along either side
LARGEST_SIDE = 10**6  # pixels that a size may claim
AT_ONCE = 4096  # headers asked of the threads at a time


def shapes_of(data: Data) -> tuple[Shape, ...]:
    """Height and width that a picture of this recipe may get: one square, or a bucket for each aspect.

    The buckets are Sana's for 512, 1024, 2048 and 4096 pixels (diffusers' ASPECT_RATIO_…_BIN, 1:4 to 4:1).
    For another size they are those for 1024, scaled and rounded to multiples of 32, each once.
    """
    if not data.aspect_buckets:
        return ((data.size, data.size),)
    scale = 1 if data.size in SANA else data.size / 1024
    shapes = [_rounded(shape, scale) for shape in SANA.get(data.size, ASPECT_RATIO_1024_BIN).values()]
    return tuple(dict.fromkeys(shapes))


def _rounded(shape: Sequence[float], scale: float) -> Shape:
    height, width = (max(round(side * scale / CELL), 1) * CELL for side in shape)
    return height, width


def find_buckets(items: Items, shapes: Sequence[Shape], bad: BadSamples, workers: int) -> np.ndarray:
    """Which of `shapes` each item gets, by the headers alone; −1 for items that are bad.  -> int16 [N]

    A header that could not be read this once is a bad item too: several processes must share one answer.
    """

    def bucket(index: int) -> int:
        try:
            size = items.size(index)
            if not all(0 < side <= LARGEST_SIDE for side in size):
                raise BadSample("wrong size", items.where(index), f"{size[0]}×{size[1]} pixels")
        except BadSample as sample:
            bad.bad(sample)
            return -1
        bad.good()
        return shapes.index(nearest(shapes, size))

    found = np.empty(len(items), np.int16)
    with (
        ThreadPoolExecutor(workers, thread_name_prefix="headers") as pool,
        tqdm(total=len(items), desc="sizes of pictures", leave=False, disable=None) as bar,
    ):
        for part in parts(len(items), AT_ONCE):
            found[part] = list(pool.map(bucket, range(part.start, part.stop)))
            bar.update(part.stop - part.start)
    return found


class Bucketed:
    """Every `batch_size` positions from a multiple of it on hold items of one shape.

    In every epoch each bucket is shuffled and cut into whole batches, and these are shuffled, all drawn from
    (seed, epoch). What does not fill a batch is left out of that epoch; it is others in the next. A bucket of
    fewer than `batch_size` items is left out altogether, with a warning.

    buckets   of each item the place of its shape in `shapes`, or −1 for none
    """

    def __init__(self, buckets: np.ndarray, shapes: Sequence[Shape], batch_size: int, seed: int):
        self._shapes, self._batch_size, self._seed = shapes, batch_size, seed
        self._members = [np.flatnonzero(buckets == bucket) for bucket in range(len(shapes))]
        full = [len(members) // batch_size for members in self._members]
        self._bucket_of_row = np.repeat(np.arange(len(shapes)), full)
        if not len(self._bucket_of_row):
            raise SprintError(
                f"no shape has the {batch_size} pictures of a batch ({len(buckets)} pictures in all); "
                "use a smaller batch_size or data.aspect_buckets = false"
            )
        left_out = sum(len(members) for members in self._members if len(members) < batch_size)
        if left_out:
            log.warning(
                "%d pictures have shapes that are too rare to fill a batch of %d", left_out, batch_size
            )
        # two epochs: a prefetcher may work at the end of one and in the next
        self._epoch = lru_cache(maxsize=2)(self._arrange)

    def index(self, position: int) -> int:
        return int(self._row(position)[0][position % self._batch_size])

    def another(self, position: int, draw: np.random.Generator) -> int:
        members = self._members[self._row(position)[1]]
        return int(members[draw.integers(len(members))])

    def shape(self, position: int) -> Shape:
        return self._shapes[self._row(position)[1]]

    def _row(self, position: int) -> tuple[np.ndarray, int]:
        """The items of this position's batch, and their bucket."""
        epoch, row = divmod(position // self._batch_size, len(self._bucket_of_row))
        rows, places = self._epoch(epoch)
        return rows[places[row]], self._bucket_of_row[places[row]]

    def _arrange(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Whole batches [batches, batch_size], bucket by bucket, and the order in which they come."""
        draw = np.random.default_rng([self._seed, epoch])
        rows = []
        for members in self._members:
            count = len(members) // self._batch_size
            chosen = draw.permutation(members)[: count * self._batch_size]
            rows.append(chosen.reshape(count, self._batch_size))
        return np.concatenate(rows), draw.permutation(len(self._bucket_of_row))
