"""Forked for test_checkpoint.py: two processes read FOLDER/one, write FOLDER/two, then one of them fails."""

import errno
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from sprint.base.ending import run_to_end
from sprint.base.errors import SprintError
from sprint.engine.checkpoint import Saver, latest, read_facts, read_tensors


def whole_state() -> dict[str, Tensor]:
    """Five rows and one row: two processes cannot share either evenly, and one holds nothing of the second."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (5, 3), "bias": (5,), "row": (1, 5)}
    networks = {
        f"{sharding}.{name}": torch.randn(shape, generator=generator)
        for sharding in ("sharded", "hybrid")
        for name, shape in shapes.items()
    }
    ema = torch.randn(4, 2, generator=generator).bfloat16()
    return networks | {"ema": ema, "step": torch.tensor(7.0), "of process 1": torch.arange(5)}


class Net(nn.Module):
    def __init__(self, state: dict[str, Tensor], sharding: str):
        super().__init__()
        for name in ("weight", "bias", "row"):
            setattr(self, name, nn.Parameter(state[f"{sharding}.{name}"].clone()))


def spread_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As two processes hold it: shards, shards of which each process has a whole replica, plain tensors."""
    meshes = {
        "sharded": init_device_mesh("cpu", (2,)),
        "hybrid": init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")),
    }
    spread = {key: tensor.clone() for key, tensor in state.items() if "." not in key}
    for sharding, mesh in meshes.items():
        spread |= {f"{sharding}.{name}": p for name, p in _shard(Net(state, sharding), mesh).items()}
    if dist.get_rank() == 0:
        del spread["of process 1"]
    return spread


def _shard(net: Net, mesh: DeviceMesh) -> dict[str, Tensor]:
    return dict(fully_shard(net, mesh=mesh).named_parameters())


@torch.no_grad()
def fill(tensors: dict[str, Tensor], value: float) -> None:
    for tensor in tensors.values():
        tensor.fill_(value)


def read_what_one_wrote(folder: Path, group: dist.ProcessGroup) -> None:
    tensors = spread_state(whole_state())
    fill(tensors, 0)
    read_tensors(latest(folder), tensors, group)
    for key, tensor in tensors.items():
        found = tensor.full_tensor() if "." in key else tensor
        assert torch.equal(found, whole_state()[key]), key


def write_for_one(folder: Path, group: dist.ProcessGroup) -> None:
    tensors = spread_state(whole_state())
    saver = Saver(folder, group=group)
    saver.save("distill-1", tensors, {"step": 1})
    fill(tensors, -1)
    for _ in range(20):  # the trainer uses its own group meanwhile
        dist.all_reduce(torch.ones(3))
    saver.wait()
    assert read_facts(folder / "000001-distill-1") == {"step": 1}


def fail_on_one(folder: Path, group: dist.ProcessGroup) -> None:
    """Each process says how it heard of it."""
    saver = Saver(folder, group=group)
    if dist.get_rank() == 1:
        os.fsync = full_disk
    saver.save("distill-2", spread_state(whole_state()), {})
    try:
        saver.wait()
    except SprintError as error:
        assert saver.troubled
        (folder.parent / f"heard-by-{dist.get_rank()}").write_text(str(error))
    missing = {"nowhere": torch.zeros(1)} if dist.get_rank() == 1 else {}
    try:
        read_tensors(folder / "000001-distill-1", missing, group)
    except SprintError as error:
        (folder.parent / f"missed-by-{dist.get_rank()}").write_text(str(error))


def full_disk(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main(here: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    own_group = dist.new_group(backend="gloo")
    read_what_one_wrote(here / "one", own_group)
    write_for_one(here / "two", own_group)
    fail_on_one(here / "two", own_group)
    dist.barrier()


if __name__ == "__main__":
    run_to_end(lambda: main(Path(sys.argv[1])))
