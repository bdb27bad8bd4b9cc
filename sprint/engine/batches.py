"""Named tuples of tensors, cut along the batch and brought to a device."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from sprint.base.random import on_device

Slices = TypeVar("Slices", bound=tuple)


def take(tensors: Slices, where: slice | range) -> Slices:
    """The same named tuple with every tensor cut along the batch."""
    where = slice(where.start, where.stop) if isinstance(where, range) else where
    return each(tensors, lambda tensor: tensor[where])


def to_device(tensors: Slices, device: torch.device) -> Slices:
    """The same named tuple with every tensor on `device`."""
    return each(tensors, lambda tensor: on_device(tensor, device))


def each(tensors: Slices, change: Callable[[Tensor], Tensor]) -> Slices:
    """The same named tuple with every tensor changed, in named tuples within it too."""
    return type(tensors)(*(each(x, change) if isinstance(x, tuple) else change(x) for x in tensors))
