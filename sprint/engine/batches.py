"""Named tuples of tensors, cut along the batch and brought to a device."""

from typing import TypeVar

import torch

from sprint.base.random import on_device

Slices = TypeVar("Slices", bound=tuple)


def take(tensors: Slices, where: slice | range) -> Slices:
    """The same named tuple with every tensor cut along the batch."""
    where = slice(where.start, where.stop) if isinstance(where, range) else where
    return type(tensors)(*(tensor[where] for tensor in tensors))


def to_device(tensors: Slices, device: torch.device) -> Slices:
    """The same named tuple with every tensor on `device`."""
    return type(tensors)(*(on_device(tensor, device) for tensor in tensors))
