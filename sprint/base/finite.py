"""Values that are not finite, found where they enter and where they leave: one pass, and an error that names them."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sprint.base.errors import SprintError

NAMED = 3  # tensors in a message; of the rest the number


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are; waits for the device. A sum is finite where all its terms are, and takes no copy:
    only where it is not are the values looked at one by one.
    """
    if not tensor.is_floating_point():
        return True
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return bool(tensor.sum(dtype=wide).isfinite()) or bool(tensor.isfinite().all())


def finite_only(tensors: Iterable[tuple[str, Tensor]], where: object) -> Iterator[tuple[str, Tensor]]:
    """The same stream. At its end it raises SprintError where values were not finite: which tensors, and how many."""
    bad, number = [], 0
    for number, (name, tensor) in enumerate(tensors, 1):  # noqa: B007 (counted)
        if not is_finite(tensor):
            bad.append(f"{name} ({int((~tensor.isfinite()).sum()):,} of {tensor.numel():,} values)")
        yield name, tensor
    if bad:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise SprintError(
            f"{where}: {len(bad)} of {number} weights are not finite (NaN or infinite): "
            f"{', '.join(bad[:NAMED])}{more}; nothing can be made of them, take an earlier checkpoint"
        )


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: object) -> None:
    """Raise SprintError as `finite_only` does."""
    for _ in finite_only(tensors, where):
        pass
