"""Where training pictures come from, and how they become batches.

A source is a function of the position: sample number p is always the same sample, whoever asks and however
the run was split or resumed. So a checkpoint holds a step number and no iterator.
"""

from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from sprint.base.door import at_home, check_no_address
from sprint.base.errors import SprintError
from sprint.data.bad import BadSamples
from sprint.data.batch import Item, Prompt, Sample
from sprint.data.buckets import Bucketed, find_buckets, shapes_of
from sprint.data.items import BadSample, Items, PromptedItems
from sprint.data.order import InOrder, Order, Shuffled
from sprint.lab.scenes import render, scene
from sprint.lab.series import training_seed
from sprint.recipe.schema import Data, DataKind

LONGEST_CHAIN = 100  # bad samples in a row, each drawn to stand in for the one before
# Random stream of data.seed from which a position draws its caption, and other samples in place of bad ones.
CHOICES = 1


T = TypeVar("T")
Share = Callable[[np.ndarray], np.ndarray]


class Source(Protocol):
    """Endless samples: captioned pictures, or such as the family has seen, or captions alone."""

    def samples(self, positions: range) -> list[Item]:
        """The samples at these positions, which determine them alone. Raises `SprintError`."""

    def batched(self, batch_size: int) -> "Source":
        """The same samples for batches of this size over all processes; with aspect buckets in another order."""

    def prompted(self) -> "Source":
        """The same samples, of which only the captions are read: each a `Prompt`."""

    @property
    def fingerprint(self) -> str | None:
        """Of what is there to be read; None where nothing tells."""

    @property
    def skipped(self) -> dict[str, int]:
        """How many bad samples this process has passed over since it started, by reason."""


def as_found(buckets: np.ndarray) -> np.ndarray:
    """The `share` of a process that is alone."""
    return buckets


def open_source(
    data: Data, batch_size: int = 1, bad_file: Path | None = None, share: Share = as_found
) -> Source:
    """The source that a recipe names.

    batch_size   over all processes: with aspect buckets its samples are of one shape, from position
                 k·batch_size up to (k + 1)·batch_size
    bad_file     where bad samples are listed, one JSON line each
    share        as of `ItemSource`

    Raises `SprintError` where there is nothing to read, or more than data.bad_share of it is seen to be bad.
    """
    if data.kind is not DataKind.scenes:
        return ItemSource(open_items(data), data, batch_size, bad_file, share)
    if data.aspect_buckets:
        raise SprintError("data.aspect_buckets = true, but scenes are all square")
    return SceneSource(data.seed)


def open_items(data: Data) -> Items:
    """What each kind needs is imported for that kind alone."""
    check_no_address(data.path)
    at_home(data.path)
    if data.kind is DataKind.folder:
        from sprint.data.kinds.folder import FolderItems

        return FolderItems(data)
    if data.kind is DataKind.webdataset:
        from sprint.data.kinds.webdataset import WebDatasetItems

        return WebDatasetItems(data)
    if data.kind is DataKind.huggingface:
        from sprint.data.kinds.huggingface import HuggingFaceItems

        return HuggingFaceItems(data)
    if data.kind is DataKind.cache:
        return _open_cache(data)
    from sprint.data.kinds.prompts import PromptItems

    return PromptItems(data)


def _open_cache(data: Data) -> Items:
    from sprint.data.cache.items import CACHE, UNFINISHED, CachedItems
    from sprint.data.cache.sana import CachedReferenceItems

    ours = any((Path(data.path) / name).is_file() for name in (CACHE, UNFINISHED))
    return CachedItems(data) if ours else CachedReferenceItems(data)


class ItemSource:
    """Items in an order: theirs, shuffled anew every epoch, or in batches of one shape.

    In the place of a bad item stands another, drawn from (data.seed, position) alone; with aspect buckets one of
    the same shape. So a run that is resumed or split otherwise meets the same samples.

    share   with aspect buckets: takes the bucket of each item (int16 [N]) as this process found it, gives that
            of the process whose answer all use. A header that one of them fails to read would else part them.
    """

    def __init__(
        self,
        items: Items,
        data: Data,
        batch_size: int = 1,
        bad_file: Path | None = None,
        share: Share = as_found,
    ):
        if not len(items):
            raise SprintError(f"{data.path}: no samples there")
        self._items, self._data = items, data
        self._bad = BadSamples(data.bad_share, len(items), bad_file)
        if data.aspect_buckets:
            self._shapes = shapes_of(data)
            self._buckets = share(find_buckets(items, self._shapes, self._bad, data.workers))
        self._order = self._order_for(batch_size)

    def _order_for(self, batch_size: int) -> Order:
        if self._data.aspect_buckets:
            return Bucketed(self._buckets, self._shapes, batch_size, self._data.seed)
        if self._items.in_order:
            return InOrder(len(self._items))
        return Shuffled(len(self._items), self._data.seed)

    def batched(self, batch_size: int) -> "ItemSource":
        other = copy(self)  # the same items, and one count of bad ones
        other._order = self._order_for(batch_size)
        return other

    def prompted(self) -> "ItemSource":
        other = copy(self)
        other._items = PromptedItems(self._items)
        return other

    @property
    def fingerprint(self) -> str | None:
        return self._items.fingerprint

    @property
    def skipped(self) -> dict[str, int]:
        return self._bad.by_reason

    def captions(self, count: int) -> list[str]:
        """Of the first `count` samples of training, or of all, without those that have none that can be read."""
        found = []
        for position in range(min(count, len(self._items))):
            draw = np.random.default_rng([self._data.seed, position, CHOICES])
            with suppress(BadSample):
                found.append(self._items.caption(self._order.index(position), draw))
        return found

    def samples(self, positions: range) -> list[Item]:
        return [self._sample(position) for position in positions]

    def _sample(self, position: int) -> Item:
        draw = np.random.default_rng([self._data.seed, position, CHOICES])
        index = self._order.index(position)
        for _ in range(LONGEST_CHAIN):
            try:
                sample = self._items.item(index, draw)
                self._check_shape(sample, index, position)
            except BadSample as bad:
                self._bad.bad(bad)
                index = self._order.another(position, draw)
            else:
                self._bad.good()
                return sample
        raise SprintError(
            f"{self._data.path}: {LONGEST_CHAIN} bad samples one after the other ({self._bad.summary()})"
        )

    def _check_shape(self, sample: Item, index: int, position: int) -> None:
        shape = self._order.shape(position)
        if shape and isinstance(sample, Sample) and sample.picture.shape[:2] != shape:
            raise BadSample("wrong size", self._items.where(index), "not as its header says")


@dataclass(frozen=True)
class SceneSource:
    """The built-in scenes; position = index in the series. `seed` picks one of the training series."""

    seed: int = 0

    def __post_init__(self):
        training_seed(self.seed)  # refuses one that has no series

    def samples(self, positions: range) -> list[Sample]:
        series = training_seed(self.seed)
        scenes = (scene(series, position) for position in positions)
        return [Sample(render(s.things), s.caption) for s in scenes]

    def batched(self, batch_size: int) -> "SceneSource":
        return self

    def prompted(self) -> "PromptedScenes":
        return PromptedScenes(self.seed)

    @property
    def fingerprint(self) -> None:
        return None

    @property
    def skipped(self) -> dict[str, int]:
        return {}


class PromptedScenes(SceneSource):
    """What the built-in scenes would show."""

    def samples(self, positions: range) -> list[Prompt]:
        series = training_seed(self.seed)
        return [Prompt(scene(series, position).caption, position) for position in positions]
