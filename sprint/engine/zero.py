"""A module and its optimizer under DeepSpeed's ZeRO-2 or ZeRO-3, through its flat pieces of weights."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sprint.base.errors import SprintError
from sprint.engine.extensions import remove_stale_locks
from sprint.engine.held import Held, Read, Tensors, on_main
from sprint.engine.optim import build_optimizer, start_state
from sprint.recipe.schema import Optimizer

BUCKET = 50_000_000  # numbers that are reduced together
LIVE = 100_000_000  # ZeRO-3: numbers of weights that are whole at a time, a block of 4.8B's and the next
READ_AT_ONCE = 2**28  # numbers in full on the way into the pieces


class Piece(NamedTuple):
    """Numbers [start, start + count) of a flattened weight lie here, at `offset` of the flat tensor `flat`."""

    flat: nn.Parameter
    offset: int
    start: int
    count: int

    def of(self, full: Tensor) -> Tensor:
        """This piece of a whole tensor, a view."""
        return full.view(-1)[self.start : self.start + self.count]

    def here(self, flat: Tensor) -> Tensor:
        """Where it lies in `flat`, or in a state of the same layout."""
        return flat[self.offset : self.offset + self.count]


class Zero(Held):
    """stage 2: gradients and optimizer state in pieces. stage 3: weights too.

    DeepSpeed clips, steps and skips what is not finite, and its base optimizer sees flat pieces only.
    """

    def __init__(self, module: nn.Module, settings: Optimizer, stage: int):
        self.stage = stage
        self.shapes = {name: p.shape for name, p in module.named_parameters()}
        super().__init__(module, settings)
        self.pieces = {name: self._piece(p) for name, p in self.parameters.items()}
        start_state(self.base, {id(piece.flat): piece.flat for piece in self.pieces.values()}.values())

    def _wrapped(self) -> nn.Module:
        deepspeed = _deepspeed()
        remove_stale_locks()
        base = build_optimizer(self.module.parameters(), self.settings)
        engine, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=base,
            config={
                "train_micro_batch_size_per_gpu": 1,  # it wants one and does not use it
                "managed_gradient_accumulation": False,  # `step` ends an accumulation; losses come averaged
                "gradient_clipping": self.settings.clip_norm,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {
                    "stage": self.stage,
                    "reduce_bucket_size": BUCKET,
                    "stage3_max_live_parameters": LIVE,
                    "stage3_max_reuse_distance": LIVE,
                    "overlap_comm": False,
                    # its own linear is an autograd.Function, which cannot save a Dual
                    "memory_efficient_linear": False,
                },
            },
        )
        self.base = base
        return engine

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.base

    def close(self) -> None:
        """DeepSpeed's hooks hold the module, and the module them."""
        self.call.destroy()

    def zero_grad(self) -> None:
        """DeepSpeed drops gradients when it has used them."""

    def backward(self, loss: Tensor) -> None:
        self.call.backward(loss)

    def update(self) -> tuple[Tensor, Tensor]:
        self.call.step()
        norm = torch.as_tensor(self.call.get_global_grad_norm(), device=self.call.device).float()
        return norm, torch.isfinite(norm)

    # ---- what is in it ------------------------------------------------------------------------------------

    def local(self) -> Tensors:
        return {name: p.ds_tensor if self.stage == 3 else p.detach() for name, p in self.parameters.items()}

    def saved(self, local: Mapping[str, Tensor]) -> Tensors:
        return dict(local) if self.stage == 2 else on_main(self._in_full, local)

    def load_into(self, local: Mapping[str, Tensor], read: Read, prefix: str) -> None:
        if self.stage == 2:
            return super().load_into(local, read, prefix)
        for names in self._groups():
            full = {name: torch.empty(self.shapes[name]) for name in names}
            read({f"{prefix}.{name}": tensor for name, tensor in full.items()})
            for name in names:
                piece = self.pieces[name]
                local[name][: piece.count].copy_(piece.of(full[name]))

    def full(self, local: Mapping[str, Tensor]) -> Tensors:
        return on_main(self._in_full if self.stage == 3 else lambda name, tensor: tensor, local)

    def _states(self) -> Tensors:
        states = {}
        for kind in self._kinds():
            named = on_main(lambda name, _, kind=kind: self._state_in_full(name, kind), self.parameters)
            states |= {f"{kind}.{name}": tensor for name, tensor in named.items()}
        return states

    def load(self, read: Read) -> None:
        read(self._buffers())
        kinds = self._kinds()
        for names in self._groups():
            full = {name: torch.empty(self.shapes[name]) for name in names}
            for prefix in ("weights", *kinds):
                shaped = full if prefix != "step" else {name: torch.empty(()) for name in names}
                read({f"{prefix}.{name}": tensor for name, tensor in shaped.items()})
                for name in names:
                    self._take(name, prefix, shaped[name])

    def _take(self, name: str, prefix: str, full: Tensor) -> None:
        """Put a weight, or what the optimizer keeps of it, into its piece here."""
        piece, p = self.pieces[name], self.parameters[name]
        if prefix == "weights":
            piece.here(piece.flat.data).copy_(piece.of(full))
            place = p.ds_tensor[: piece.count] if self.stage == 3 else p.data
            place.copy_(piece.of(full) if self.stage == 3 else full)
        elif prefix == "step":
            self.base.state[piece.flat]["step"].copy_(full)
        else:
            piece.here(self.base.state[piece.flat][prefix]).copy_(piece.of(full))

    def _kinds(self) -> list[str]:
        return list(next(iter(self.base.state.values())))

    def _in_full(self, name: str, local: Tensor) -> Tensor:
        """A weight, or its average, from the pieces of all processes."""
        return self._assembled(name, local[: self.pieces[name].count])

    def _state_in_full(self, name: str, kind: str) -> Tensor:
        piece = self.pieces[name]
        state = self.base.state[piece.flat][kind]
        return state.clone() if kind == "step" else self._assembled(name, piece.here(state))

    def _assembled(self, name: str, here: Tensor) -> Tensor:
        piece, full = self.pieces[name], torch.zeros(self.shapes[name], device=here.device)
        piece.of(full).copy_(here)
        dist.all_reduce(full)
        return full

    def _groups(self) -> list[list[str]]:
        """Names of weights that together have at most `READ_AT_ONCE` numbers, or of one."""
        groups, size = [[]], 0
        for name, shape in self.shapes.items():
            size += shape.numel()
            if size > READ_AT_ONCE and groups[-1]:
                groups.append([])
                size = shape.numel()
            groups[-1].append(name)
        return groups

    def _piece(self, p: nn.Parameter) -> Piece:
        """Where DeepSpeed put this process's numbers of a weight; none may be here."""
        if self.stage == 3:
            group, offset, size = self.call.optimizer.grad_position[self.call.optimizer.get_param_id(p)]
            start = min(size * dist.get_rank(), p.ds_numel)
            flat = self.call.optimizer.fp32_partitioned_groups_flat[group]
            return Piece(flat, offset, start, min(size, p.ds_numel - start))
        (flat,) = self.call.optimizer.single_partition_of_fp32_groups
        if p._hp_mapping is None:
            return Piece(flat, 0, 0, 0)
        whole, part = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
        return Piece(flat, part.start, whole.start, whole.numel)


def _deepspeed():
    try:
        import deepspeed
    except ImportError as error:
        raise SprintError(
            "engines zero2 and zero3 need DeepSpeed: pip install sprint-distill[cluster]"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
