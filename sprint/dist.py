"""Random numbers: what a sample gets depends on its place in the run, not on who draws it or what ran before."""

import hashlib

import torch


def step_generator(seed: int, stream: str, step: int) -> torch.Generator:
    """A CPU generator for one purpose at one step: the same whatever ran before, so that resume is exact.

    stream  names the purpose ("adapt", "distill", "logvar"); streams are independent
    """
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
