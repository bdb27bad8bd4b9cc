"""Which item stands at which position: functions of the position, so that a checkpoint need not hold them."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from sprint.data.pictures import Shape


class Order(Protocol):
    def index(self, position: int) -> int:
        """The item at a position."""

    def another(self, position: int, draw: np.random.Generator) -> int:
        """An item that may stand in for the one at this position."""

    def shape(self, position: int) -> Shape | None:
        """Height and width that a picture at this position must have; None: whatever its item gives."""


@dataclass(frozen=True)
class InOrder:
    """Position p is item p mod `count`."""

    count: int

    def index(self, position: int) -> int:
        return position % self.count

    def another(self, position: int, draw: np.random.Generator) -> int:
        return int(draw.integers(self.count))

    def shape(self, position: int) -> None:
        return None


@dataclass(frozen=True)
class Shuffled(InOrder):
    """Every item once in each epoch of `count` positions, in an order drawn from (seed, epoch)."""

    seed: int

    def index(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        return int(_permutation(self.seed, epoch, self.count)[place])


@lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
