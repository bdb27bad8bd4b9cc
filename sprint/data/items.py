"""A finite collection that a run reads by index, and what it says of a sample that cannot be used."""

from abc import ABC, abstractmethod
from typing import BinaryIO, Literal

import numpy as np

from sprint.base.door import shown
from sprint.base.errors import SprintError
from sprint.data.batch import Item, Prompt

Reason = Literal[
    "missing picture",
    "unreadable picture",
    "picture too large",
    "missing caption",
    "empty caption",
    "unreadable caption",
    "missing latent",
    "unreadable latent",
    "NaN latent",
    "missing text",
    "unreadable text",
    "NaN text",
    "wrong size",
    "hostile entry",
    "repeated entry",
    "damaged shard",
]


class BadSample(Exception):
    """A sample that the run passes over and counts.

    reason   one of a few fixed words, by which they are counted
    where    names the sample and no other ("folder/a.png", "shard.tar: a/b")
    detail   what a library said of it, one line
    """

    def __init__(self, reason: Reason, where: str, detail: str = ""):
        super().__init__(f"{shown(where, 1000)}: {reason}" + (f": {shown(detail, 1000)}" if detail else ""))
        self.reason, self.where, self.detail = reason, where, detail


class Items(ABC):
    """Samples by index, in an order that does not change while the files do not.

    Several threads ask at once. `SprintError` is for a collection that cannot be used at all.
    """

    in_order = False  # True: position p is item p mod N; else every epoch is shuffled

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def item(self, index: int, draw: np.random.Generator) -> Item:
        """Sample number `index`; `draw` chooses between its captions. Raises `BadSample`."""

    def caption(self, index: int, draw: np.random.Generator) -> str:
        """Of sample number `index`, as `item` gives it. Raises `BadSample`."""
        return self.item(index, draw).caption

    def where(self, index: int) -> str:
        """Names sample number `index` and no other, as `BadSample` does."""
        return f"sample {index}"

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of the names or the index that `index` counts in; None where there is none to be had cheaply.

        Another one at a later start: the files are not those that positions counted in before.
        """
        return None

    def picture(self, index: int) -> str | BinaryIO:
        """The picture's file as it is: a path, or its bytes. Raises `BadSample`."""
        raise SprintError("samples of this kind have no pictures")

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of its picture in pixels, upright and not yet resized, from its header alone.

        Asked for aspect buckets only, once for every item. Raises `BadSample`.
        """
        raise SprintError("data.aspect_buckets = true, but samples of this kind have no aspect to keep")


class PromptedItems(Items):
    """Captions of other samples, whose pictures nobody reads; the position is their place among them."""

    def __init__(self, items: Items):
        self._items, self.in_order = items, items.in_order

    def __len__(self) -> int:
        return len(self._items)

    def item(self, index: int, draw: np.random.Generator) -> Prompt:
        return Prompt(self._items.caption(index, draw), index)

    def where(self, index: int) -> str:
        return self._items.where(index)

    @property
    def fingerprint(self) -> str | None:
        return self._items.fingerprint


def said(error: BaseException) -> str:
    """One line of what the system or a library said."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
