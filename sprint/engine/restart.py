"""Processes that torchrun starts again find each other."""

import os
from datetime import timedelta

import torch
from torch import distributed as dist


def rendezvous_after_restart(timeout: timedelta) -> None:
    """Let processes that torchrun has started again find each other, and not those that died.

    torchrun's store outlives an attempt and still has the old addresses (pytorch#135712), so this one's are kept
    apart. With several hosts restarts are not counted alike: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 there.
    """
    names = (
        "TORCHELASTIC_RESTART_COUNT",
        "GROUP_WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_PORT",
    )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    attempt, hosts, rank, local_rank, processes, port = (int(os.environ[name]) for name in names)
    if attempt == 0 or hosts > 1:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        backend = "nccl"
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, processes, is_master=False, timeout=timeout)
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=timeout)
