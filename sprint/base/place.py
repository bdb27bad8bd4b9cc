"""Where this process works: its device, and which of how many processes it is, without an engine."""

import os
from dataclasses import dataclass

import torch

from sprint.base.errors import SprintError


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is, as torchrun says."""

    rank: int = 0
    processes: int = 1

    @classmethod
    def of_this_process(cls) -> "Place":
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    @property
    def device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def usable_device(name: str | None) -> str:
    """The name, if a tensor can live and be read there; without one, CUDA where there is one. Raises SprintError."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: built without CUDA
        reason = str(error).split("\n")[0]
        raise SprintError(f"device {name} cannot be used here: {reason}") from error
    return name
