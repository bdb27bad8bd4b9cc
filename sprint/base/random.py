"""Random numbers, by place in the run and not by who draws them or what ran before; and their way to a GPU."""

import hashlib

import torch
from torch import Tensor


def step_generator(seed: int, stream: str, step: int) -> torch.Generator:
    """A CPU generator for one purpose at one step: the same whatever ran before, so that resume is exact.

    stream  names the purpose ("adapt", "distill", "logvar"); streams are independent
    """
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor there; to a GPU through pinned memory, so that the host does not wait until the GPU is ready."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
