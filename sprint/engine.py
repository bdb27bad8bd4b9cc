"""The only file that knows accelerate: devices, precision, processes.

Every process holds whole networks and works on its slice of the batch; gradients are averaged after the
backward pass. What a sample draws depends on its place in the batch, so the losses do not depend on the
number of processes.
"""

import os
from collections.abc import Iterable
from types import MethodType
from typing import TypeVar

import torch
from accelerate import Accelerator
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from sprint.cpu import use_onednn
from sprint.dist import on_device
from sprint.errors import SprintError
from sprint.recipe import Precision

Slices = TypeVar("Slices", bound=tuple)


class Engine:
    """One process's share of a run.

    Raises SprintError if the launcher asked for several processes and fewer are there.
    """

    def __init__(self, precision: Precision):
        self.precision = precision
        bf16 = precision is Precision.bf16
        asked = int(os.environ.get("WORLD_SIZE", os.environ.get("ACCELERATE_NUM_PROCESSES", "1")))
        several_on_cpu = asked > 1 and not torch.cuda.is_available()  # else accelerate starts no gloo
        self.accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=several_on_cpu)
        if asked != self.processes:
            raise SprintError(
                f"asked for {asked} processes, running in {self.processes}; start with torchrun"
            )
        self._hosts = torch.distributed.new_group(backend="gloo") if self.processes > 1 else None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def processes(self) -> int:
        return self.accelerator.num_processes

    @property
    def main_process(self) -> bool:
        return self.accelerator.is_main_process

    def trainable(self, module: nn.Module) -> nn.Module:
        """On the device in fp32, on every process as on the first; time embeddings stay fp32 under autocast."""
        module.to(self.device, torch.float32)
        use_onednn(module)
        if self.processes > 1:
            for tensor in module.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)
        if self.precision is Precision.bf16:
            keep_time_in_float32(module)
        return module

    def frozen(self, network: SanaTransformer2DModel) -> SanaTransformer2DModel:
        """On the device without gradients; in bf16 but for the time embedding, if the run is."""
        network.to(self.device).eval().requires_grad_(False)
        use_onednn(network)
        if self.precision is Precision.bf16:
            exact = {name: tensor.clone() for name, tensor in network.time_embed.state_dict().items()}
            network.to(torch.bfloat16)
            network.time_embed.to(torch.float32).load_state_dict(exact)
            keep_time_in_float32(network)
        return network

    def autocast(self):
        return self.accelerator.autocast()

    def share(self, batch_size: int) -> range:
        """This process's places in a batch. Raises SprintError where the batch does not divide evenly."""
        size, rest = divmod(batch_size, self.processes)
        if rest:
            raise SprintError(f"batch size {batch_size} does not divide over {self.processes} processes")
        first = self.accelerator.process_index * size
        return range(first, first + size)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Mean over processes, in place; nothing to do for one."""
        if self.processes == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([g.reshape(-1) for g in grads]), "mean")
        for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def average(self, value: Tensor) -> Tensor:
        """Mean over processes."""
        return self.accelerator.reduce(value.to(self.device), "mean")

    def agree(self, flag: bool) -> bool:
        """The main process's word, on every process; between hosts, so that no GPU is waited for."""
        if self.processes == 1:
            return flag
        word = torch.tensor([flag])
        torch.distributed.broadcast(word, src=0, group=self._hosts)
        return bool(word)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def keep_time_in_float32(module: nn.Module) -> None:
    """Shield the time embedders of all networks inside from autocast: bf16 has no number from 0.500 to 0.504."""
    for part in module.modules():
        if isinstance(part, SanaTransformer2DModel):
            part.time_embed.forward = MethodType(_forward_in_float32, part.time_embed)


def _forward_in_float32(embed: nn.Module, timestep: Tensor, hidden_dtype=None, **conditions):
    with torch.autocast(timestep.device.type, enabled=False):
        return type(embed).forward(embed, timestep, hidden_dtype=torch.float32, **conditions)


def take(tensors: Slices, where: slice | range) -> Slices:
    """The same named tuple with every tensor cut along the batch."""
    where = slice(where.start, where.stop) if isinstance(where, range) else where
    return type(tensors)(*(tensor[where] for tensor in tensors))


def to_device(tensors: Slices, device: torch.device) -> Slices:
    """The same named tuple with every tensor on `device`."""
    return type(tensors)(*(on_device(tensor, device) for tensor in tensors))
