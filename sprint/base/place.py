"""Which of how many processes this is, without an engine."""

import os
from dataclasses import dataclass

import torch


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
