"""From positions to batches: which samples a batch holds, and how it is made ahead."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch.nn.functional import pad

from sprint.base.errors import SprintError
from sprint.base.random import on_device
from sprint.data.batch import Batch, Encoded, Sample, Traced, Trajectory, parts
from sprint.data.source import T
from sprint.models.encoders import TEXT_UNIT, Family
from sprint.recipe.shares import share_of


def batch_positions(step: int, batch_size: int, rank: int = 0, processes: int = 1) -> range:
    """The positions of batch number `step` that fall to process `rank`: consecutive, in order of rank.

    batch_size    over all processes; raises `SprintError` unless they share it evenly
    """
    share, first = share_of(batch_size, rank, processes), step * batch_size
    return range(first + share.start, first + share.stop)


def encode(samples: list[Sample], family: Family, largest: int = 0, unit: int = TEXT_UNIT) -> Batch:
    """Pictures and captions through the frozen family, at most `largest` at a time (0: all).

    unit   the text's length is a multiple of it that holds the longest caption, or the family's longest

    -> tensors on the family's device.  Raises `SprintError` if the autoencoder cannot divide the pictures
    into latent cells.
    """
    pictures = np.stack([sample.picture for sample in samples])
    cell = family.downscale
    for size in pictures.shape[1:3]:
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


def collate(
    encoded: list[Encoded], device: torch.device | str, unit: int = TEXT_UNIT, max_length: int = 0
) -> Batch | Traced:
    """One batch of samples that were encoded before: the latents stacked, the texts padded with zeros.

    unit         the text's length is a multiple of it that holds the longest text,
    max_length   but no more than this (0: no such limit); longer texts keep their first tokens

    -> float32 latent, text and trajectories, int64 mask, on the device.  Raises `SprintError` for latents of
    several shapes.
    """
    shapes = sorted({tuple(sample.latent.shape) for sample in encoded})
    if len(shapes) > 1:
        raise SprintError(
            f"latents of shapes {shapes[0]} and {shapes[1]} in one batch; "
            "set data.aspect_buckets = true if they were encoded so"
        )
    texts = [sample.text[: max_length or None] for sample in encoded]
    length = max(math.ceil(max(map(len, texts)) / unit), 1) * unit
    length = min(length, max_length or length)
    masks = [torch.ones(len(text), dtype=torch.int64) for text in texts]
    batch = Batch(
        on_device(torch.stack([sample.latent for sample in encoded]), device).float(),
        on_device(torch.stack([pad(text, (0, 0, 0, length - len(text))) for text in texts]), device).float(),
        on_device(torch.stack([pad(mask, (0, length - len(mask))) for mask in masks]), device),
    )
    trajectories = [sample.trajectory for sample in encoded if sample.trajectory]
    if not trajectories:
        return batch
    stacked = (torch.stack(tensors) for tensors in zip(*trajectories, strict=True))
    return Traced(*batch, Trajectory(*(on_device(tensor, device).float() for tensor in stacked)))


def prefetch(make: Callable[[int], T], start: int, stop: int, workers: int = 1) -> Iterator[T]:
    """Yield make(start), …, make(stop − 1) in order, made by `workers` ≥ 1 threads, at most workers + 1 early.

    What `make` raises is raised here in its turn, after the items before it. Closing the iterator, or
    leaving it by an exception, drops what is queued and waits for the items in the making. Wrap it in
    `contextlib.closing` to be sure of that. Autocast and grad mode are per thread: `make` sees the defaults.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
    try:
        steps = iter(range(start, stop))
        ahead = deque(pool.submit(make, step) for step in islice(steps, workers + 1))
        while ahead:
            item = ahead.popleft().result()
            ahead.extend(pool.submit(make, step) for step in islice(steps, 1))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
