"""A module with its optimizer: whole, replicated, or in rows over the processes. `sprint.engine.zero` has DeepSpeed's.

Names in a checkpoint are "weights.NAME", "buffers.NAME" and "STATE.NAME" for what the optimizer keeps of a
weight ("exp_avg.NAME"). Each stands for the whole tensor, whoever holds which rows of it: so a run goes on
under another engine, or with another number of processes.
"""

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sprint.engine.optim import (
    Rows,
    build_optimizer,
    clip_gradients,
    placement,
    start_state,
)
from sprint.recipe.schema import Optimizer

Tensors = dict[str, Tensor]
Read = Callable[[Tensors], None]  # fills tensors in place from a checkpoint, by name; collective


class Held:
    """A module and its optimizer in one process; the others below differ in who holds what.

    A set of tensors by name is `local` as this process holds it, `saved` as a checkpoint wants it, and `full` as
    whole tensors on the main process.

    module     the bare module, for its methods and its attributes
    optimizer  over what this process holds; its param_groups carry the learning rate

    Call this object, not the module: hooks that gather weights or average gradients sit on the outermost call.
    """

    def __init__(self, module: nn.Module, settings: Optimizer):
        self.module, self.settings = module, settings
        self.call = self._wrapped()
        self.parameters: dict[str, nn.Parameter] = self._parameters()
        self.optimizer = self._optimizer()

    def _wrapped(self) -> nn.Module:
        return self.module

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self.parameters.values(), self.settings)
        start_state(optimizer)
        return optimizer

    def __call__(self, *args):
        return self.call(*args)

    def close(self) -> None:
        """Let go of what would outlive this object."""

    # ---- an update --------------------------------------------------------------------------------------

    def accumulating(self, more: bool) -> contextlib.AbstractContextManager:
        """Around a forward and its backward; `more` of them follow before the update."""
        return contextlib.nullcontext()

    def zero_grad(self) -> None:
        self.module.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> tuple[Tensor, Tensor]:
        """Clip, and move the weights unless the norm is not finite.  -> norm before the clip, whether they moved

        Both are scalars on the device, which nobody has to wait for.
        """
        norm = self._clip()
        moved = torch.isfinite(norm)
        self.optimizer.found_inf = moved.logical_not().float()
        self.optimizer.step()
        return norm, moved

    def _clip(self) -> Tensor:
        return clip_gradients(self.parameters.values(), self.settings.clip_norm)

    # ---- what is in it ------------------------------------------------------------------------------------

    def local(self) -> Tensors:
        """The weights."""
        return {name: weight.detach() for name, weight in self.parameters.items()}

    def saved(self, local: Mapping[str, Tensor]) -> Tensors:
        """Tensors that lie as `local()` does, as a checkpoint wants them. Collective."""
        return dict(local)

    def full(self, local: Mapping[str, Tensor]) -> Tensors:
        """Tensors that lie as `local()` does, whole, on the CPU of the main process alone. Collective."""
        return on_main(lambda name, tensor: tensor, local)

    def load_into(self, local: Mapping[str, Tensor], read: Read, prefix: str) -> None:
        """Fill tensors that lie as `local()` does from a checkpoint's "PREFIX.NAME". Collective."""
        read({f"{prefix}.{name}": tensor for name, tensor in self.saved(local).items()})

    def tensors(self) -> Tensors:
        """Everything a checkpoint needs, by the names above. Collective."""
        weights = {f"weights.{name}": tensor for name, tensor in self.saved(self.local()).items()}
        return weights | self._buffers() | self._states()

    def load(self, read: Read) -> None:
        """Fill it all from a checkpoint. Collective."""
        read(self.tensors())

    def _buffers(self) -> Tensors:
        kept = self.module.state_dict().keys()
        return {f"buffers.{name}": buffer for name, buffer in self.module.named_buffers() if name in kept}

    def _states(self) -> Tensors:
        state = self.optimizer.state
        return {
            f"{kind}.{name}": self._saved_state(name, kind, tensor)
            for name, weight in self.parameters.items()
            for kind, tensor in state[weight].items()
        }

    def _saved_state(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        return tensor


def on_main(full: Callable[[str, Tensor], Tensor], local: Mapping[str, Tensor]) -> Tensors:
    """full(name, tensor) of each, a collective maybe, on the CPU of the main process; nothing on the others."""
    main, result = not dist.is_initialized() or dist.get_rank() == 0, {}
    for name, tensor in local.items():
        tensor = full(name, tensor)
        if main:
            result[name] = tensor.detach().cpu()
    return result


class Replicated(Held):
    """The same in every process; the last backward before an update averages the gradients (DDP)."""

    def _wrapped(self) -> nn.Module:
        return DistributedDataParallel(self.module, broadcast_buffers=False, gradient_as_bucket_view=True)

    def accumulating(self, more: bool) -> contextlib.AbstractContextManager:
        return self.call.no_sync() if more else contextlib.nullcontext()


class RowSharded(Held):
    """Every process holds some rows of every weight; `fully_shard` has been applied to the module.

    The optimizer moves the rows themselves, plain tensors that share memory with FSDP2's.
    """

    def __init__(self, module: nn.Module, settings: Optimizer, mesh: DeviceMesh):
        self.rows = mesh["shard"].get_group()
        super().__init__(module, settings)

    def _parameters(self) -> dict[str, nn.Parameter]:
        self.sharded: dict[str, DTensor] = dict(self.module.named_parameters())
        return {name: nn.Parameter(p.to_local().detach()) for name, p in self.sharded.items()}

    def _optimizer(self) -> torch.optim.Optimizer:
        rows = {local: Rows(len(self.sharded[name]), self.rows) for name, local in self.parameters.items()}
        optimizer = build_optimizer(self.parameters.values(), self.settings, rows)
        start_state(optimizer)
        return optimizer

    def zero_grad(self) -> None:
        """Of the rows: after a forward without a backward the module shows whole weights, and not these."""
        for name, local in self.parameters.items():
            local.grad = self.sharded[name].grad = None

    def update(self) -> tuple[Tensor, Tensor]:
        for name, local in self.parameters.items():
            gradient = self.sharded[name].grad
            local.grad = None if gradient is None else gradient.to_local()
        return super().update()

    def _clip(self) -> Tensor:
        return clip_gradients(self.parameters.values(), self.settings.clip_norm, self.rows)

    def saved(self, local: Mapping[str, Tensor]) -> Tensors:
        return {name: self._of_rows(name, tensor) for name, tensor in local.items()}

    def full(self, local: Mapping[str, Tensor]) -> Tensors:
        return on_main(lambda name, tensor: self._of_rows(name, tensor).full_tensor(), local)

    def _saved_state(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        by_row = placement(self.parameters[name].ndim, kind) != "whole"
        return self._of_rows(name, tensor) if by_row else tensor

    def _of_rows(self, name: str, rows: Tensor) -> DTensor:
        """The tensor whose rows lie as those of weight `name` do; it shares memory with `rows`."""
        weight = self.sharded[name]
        shape = torch.Size((len(weight), *rows.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            rows.detach(), weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride
        )
