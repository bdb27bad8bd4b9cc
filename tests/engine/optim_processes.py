"""Forked for test_optim.py: optimizers on row shards, some uneven and some without rows."""

import gc
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sprint.base.ending import run_to_end
from sprint.engine.optim import (
    Rows,
    build_optimizer,
    clip_gradients,
    placement,
    start_state,
)
from sprint.recipe.schema import Optimizer, OptimizerKind

STEPS = 5
SHAPES = [(61, 40), (2, 6), (1, 5), (4, 3, 1, 1), (5, 2, 3, 3), (7,), (1,)]
SETTINGS = {
    "came": Optimizer(OptimizerKind.came, 1e-2, weight_decay=0.1, clip_norm=0.5),
    "adamw": Optimizer(OptimizerKind.adamw, 1e-2, (0.9, 0.99), weight_decay=0.1, clip_norm=0.5),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def random_tensors(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """One of each shape, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [10.0**-i * torch.randn(shape, generator=generator, dtype=dtype) for i, shape in enumerate(SHAPES)]


class Run:
    """Updates of all weights by one kind of optimizer: whole, or this process's shards over `mesh`."""

    def __init__(self, kind: str, dtype: str, mesh: DeviceMesh | None = None):
        self.mesh, self.dtype, self.settings = mesh, DTYPES[dtype], SETTINGS[kind]
        self.group = None if mesh is None else mesh.get_group()
        self.weights = [nn.Parameter(self._share(w)) for w in random_tensors(0, self.dtype)]
        rows = None
        if mesh is not None:
            rows = {w: Rows(shape[0], self.group) for w, shape in zip(self.weights, SHAPES, strict=True)}
        self.optimizer = build_optimizer(self.weights, self.settings, rows)
        start_state(self.optimizer)
        self.norms: list[float] = []

    def _share(self, whole: Tensor) -> Tensor:
        return whole if self.mesh is None else distribute_tensor(whole, self.mesh, [Shard(0)]).to_local()

    def update(self, step: int, spoilt: bool = False) -> None:
        """`spoilt`: one number is not one, in the last row of one weight, which one process has."""
        self._set_gradients(1 + step, spoilt)
        norm = clip_gradients(self.weights, self.settings.clip_norm, self.group)
        self.norms.append(norm.item())
        self.optimizer.found_inf = torch.isfinite(norm).logical_not().float()
        self.optimizer.step()

    def _set_gradients(self, seed: int, spoilt: bool) -> None:
        gradients = random_tensors(seed, self.dtype)
        if spoilt:
            gradients[0][-1, -1] = math.nan
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = self._share(gradient)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of weights and state, whole again."""
        kept = {}
        for i, (weight, shape) in enumerate(zip(self.weights, SHAPES, strict=True)):
            kept[f"{i} weight"] = self._whole(weight.detach(), shape[0])
            for name, tensor in self.optimizer.state[weight].items():
                by_row = placement(weight.ndim, name) != "whole"
                kept[f"{i} {name}"] = self._whole(tensor, shape[0]) if by_row else same_everywhere(tensor)
        return {name: tensor.clone() for name, tensor in kept.items()}

    def _whole(self, rows: Tensor, count: int) -> Tensor:
        """The tensor of so many rows, of which each process has its own."""
        if self.mesh is None:
            return rows
        shape = torch.Size((count, *rows.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self.mesh, [Shard(0)], shape=shape, stride=stride).full_tensor()


def same_everywhere(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        everyones = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, tensor)
        assert all(torch.equal(tensor, other) for other in everyones)
    return tensor


class Watch:
    """Stands for `dist.all_reduce`: counts calls, and at each looks for the largest new tensor beside `run`'s own."""

    def __init__(self, run: Run):
        self.run, self.calls, self.largest = run, 0, 0
        self.all_reduce = dist.all_reduce
        gc.freeze()  # what is there already is not looked at again

    def __enter__(self) -> "Watch":
        dist.all_reduce = self
        return self

    def __exit__(self, *error) -> None:
        dist.all_reduce = self.all_reduce

    def __call__(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        self.calls += 1
        states = (state for w in self.run.weights for state in self.run.optimizer.state[w].values())
        own = {t.untyped_storage().data_ptr() for t in (tensor, *(w.grad for w in self.run.weights), *states)}
        storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is Tensor]
        self.largest = max([self.largest, *(s.nbytes() for s in storages if s.data_ptr() not in own)])
        self.all_reduce(tensor, group=group)


def result(run: Run) -> dict:
    with Watch(run) as watch:
        for step in range(STEPS):
            run.update(step)
    tensors = run.tensors()
    run.update(STEPS, spoilt=True)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in run.tensors().items())
    return {
        "tensors": tensors,
        "norms": run.norms,
        "all_reduces": watch.calls,
        "largest": watch.largest,
        "empty": sum(not w.numel() for w in run.weights),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results = {f"{kind}, {dtype}": result(Run(kind, dtype, mesh)) for kind in SETTINGS for dtype in DTYPES}
    if dist.get_rank() == dist.get_world_size() - 1:  # the one with the fewest rows
        torch.save(results, folder / "result.pt")
    dist.barrier()


if __name__ == "__main__":
    run_to_end(lambda: main(Path(sys.argv[1])))
