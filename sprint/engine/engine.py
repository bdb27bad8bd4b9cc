"""Devices, precision, processes, who holds what: with `held` and `zero`, all that knows accelerate, FSDP2, DeepSpeed.

single   one process
ddp      whole networks everywhere, gradients averaged
fsdp2    every weight, its gradient and its optimizer state in rows over the processes (`fully_shard`)
zero2    DeepSpeed: gradients and optimizer state in pieces; zero3: weights too

What a sample draws depends on its place in the batch, so the losses depend neither on the engine nor on the
number of processes. Weights are fp32 in all of them; bf16 is autocast's, per operation.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import ModelMixin
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from sprint.base.errors import SprintError
from sprint.base.place import check_launcher
from sprint.base.products import (
    Multiply,
    bf16_linear,
    fastest_products,
    float32_products,
    use_products,
)
from sprint.engine.heartbeat import Heartbeat
from sprint.engine.held import Held, Replicated, RowSharded
from sprint.engine.restart import rendezvous_after_restart
from sprint.models.families import family_of, networks_in
from sprint.models.teacher import DENSE_TIME
from sprint.recipe.schema import EngineKind, Optimizer, Precision, Products, Recipe
from sprint.recipe.shares import share_of

# One process may hash or export for hours; dead processes are found by the heartbeat, not by this.
HOST_TIMEOUT = timedelta(days=1)
# What accelerate's launcher sets, also where it silently starts one process.
ACCELERATE_LAUNCHED = "ACCELERATE_DYNAMO_MODE"


class Engine:
    """One process's share of a run.

    shard_size     fsdp2: processes that hold one copy of the weights between them; 0 is all
    shard_teacher  frozen networks in rows over the same processes too
    timeout        seconds that a process waits for the others
    products       how blocks multiply on a CPU

    Raises SprintError if the launcher asked for several processes and fewer are there, if there are several
    and the engine is for one, and where the processes do not divide into shards.
    """

    def __init__(
        self,
        precision: Precision,
        kind: EngineKind = EngineKind.single,
        shard_size: int = 0,
        shard_teacher: bool = False,
        timeout: int = 600,
        products: Products = Products.exact,
    ):
        self.precision, self.asked = precision, kind
        self.timeout = timedelta(seconds=timeout)
        bf16 = precision is Precision.bf16
        check_launcher()
        asked = int(os.environ.get("WORLD_SIZE", os.environ.get("ACCELERATE_NUM_PROCESSES", "1")))
        gpus, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
        if 0 < gpus <= local_rank:
            raise SprintError(
                f"process {local_rank} of this machine, which has {gpus} GPUs; start as many as there are"
            )
        several_on_cpu = asked > 1 and not torch.cuda.is_available()  # else accelerate starts no gloo
        try:
            rendezvous_after_restart(self.timeout)
            self.accelerator = Accelerator(
                mixed_precision="bf16" if bf16 else "no",
                cpu=several_on_cpu,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=self.timeout)],
            )
        except dist.DistError as error:
            raise SprintError(not_all_met(asked, timeout)) from error
        self._check_processes(asked)
        if (
            ACCELERATE_LAUNCHED in os.environ
            and "WORLD_SIZE" not in os.environ
            and kind is not EngineKind.single
        ):
            raise SprintError(
                "accelerate launch has started 1 process and does not say how many it was asked for; "
                "start with torchrun, or for one process with engine=single"
            )
        self.hosts = self.new_gloo_group()
        self.shard_teacher = shard_teacher and self.processes > 1
        self.mesh = self._mesh(shard_size) if self.processes > 1 else None
        self.multiply = self._products(products)

    @classmethod
    def of(cls, recipe: Recipe) -> "Engine":
        return cls(
            recipe.precision,
            recipe.engine,
            recipe.shard_size,
            recipe.shard_teacher,
            recipe.timeout,
            recipe.products,
        )

    def _products(self, asked: Products) -> Multiply:
        """How blocks multiply on a CPU: by the main process's clock, lest processes differ."""

        def found() -> str | None:
            return "bf16" if fastest_products() is bf16_linear else None

        may_be_bf16 = asked is Products.fastest and self.precision is Precision.fp32
        if may_be_bf16 and self.device.type == "cpu" and self.broadcast_from_main(found):
            return bf16_linear
        return float32_products()

    @property
    def kind(self) -> EngineKind:
        """What is in force: one process has nobody to share with."""
        return self.asked if self.processes > 1 else EngineKind.single

    def _check_processes(self, asked: int) -> None:
        if asked != self.processes:
            raise SprintError(
                f"asked for {asked} processes, running in {self.processes}; start with torchrun"
            )
        if self.processes > 1 and self.asked is EngineKind.single:
            raise SprintError(
                f"engine = single, but {self.processes} processes are running; set engine=ddp, fsdp2, zero2 or zero3"
            )

    def _mesh(self, shard_size: int) -> DeviceMesh:
        """Rows of processes that hold a copy between them; several rows are copies of each other (HSDP)."""
        size = shard_size or self.processes
        copies, rest = divmod(self.processes, size)
        if rest:
            raise SprintError(f"shard_size = {size} does not divide {self.processes} processes")
        if copies == 1:
            return init_device_mesh(self.device.type, (size,), mesh_dim_names=("shard",))
        return init_device_mesh(self.device.type, (copies, size), mesh_dim_names=("copy", "shard"))

    def __str__(self) -> str:
        if self.processes == 1:
            alone = (
                "" if self.asked is EngineKind.single else f" ({self.asked.value} has nobody to share with)"
            )
            return f"engine single, 1 process on {self.device.type}{alone}{self._in_bf16}"
        copies = f", {self.mesh.shape[0]} copies of the weights" if self.mesh.ndim > 1 else ""
        return f"engine {self.kind.value}, {self.processes} processes on {self.device.type}{copies}{self._in_bf16}"

    @property
    def _in_bf16(self) -> str:
        return ", blocks multiply in bf16" if self.multiply is bf16_linear else ""

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def processes(self) -> int:
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def main_process(self) -> bool:
        return self.accelerator.is_main_process

    # ---- networks -----------------------------------------------------------------------------------

    def wrap(self, module: nn.Module, settings: Optimizer) -> Held:
        """A module with its optimizer, held as this engine holds networks.

        Every block of `module` that is a teacher's network's is a unit of sharding. Call what comes back and not
        `module`: the hooks that gather and average sit on the outermost call.
        """
        if self.kind in (EngineKind.single, EngineKind.ddp):
            return self.replicated(module, settings)
        self._place(module)
        if self.kind is EngineKind.fsdp2:
            self._shard(module)
            return RowSharded(module, settings, self.mesh)
        from sprint.engine.zero import Zero  # DeepSpeed is an extra

        return Zero(module, settings, stage=2 if self.kind is EngineKind.zero2 else 3)

    def replicated(self, module: nn.Module, settings: Optimizer) -> Held:
        """As `wrap`, but whole in every process: for small modules."""
        self._place(module)
        return Held(module, settings) if self.processes == 1 else Replicated(module, settings)

    def frozen(self, network: ModelMixin) -> ModelMixin:
        """On the device without gradients; in bf16 but for the time embedding, if the run is."""
        network.to(self.device).eval().requires_grad_(False)
        self.hasten(network)
        time_embedder = family_of(network).time_embedder(network)
        if self.precision is Precision.bf16:
            exact = {name: tensor.clone() for name, tensor in time_embedder.state_dict().items()}
            network.to(torch.bfloat16)
            time_embedder.to(torch.float32).load_state_dict(exact)
            keep_time_in_float32(network)
        if self.shard_teacher:
            fully_shard(time_embedder, mesh=self.mesh)  # of another dtype, so a unit of its own
            self._shard(network)
            with self.autocast():
                warm_up_fsdp_root(network)
        return network

    def _place(self, module: nn.Module) -> None:
        """On the device in fp32, on every process as on the first; time embeddings stay fp32 under autocast."""
        module.to(self.device, torch.float32)
        self.hasten(module)
        if self.processes > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)
        if self.precision is Precision.bf16:
            keep_time_in_float32(module)

    def hasten(self, module: nn.Module) -> None:
        """The order in memory and the products that are fastest here; only blocks multiply in bf16."""
        use_products(module)
        for network in networks_in(module):
            family = family_of(network)
            family.lay_out(network)
            use_products(family.blocks(network), self.multiply)

    def _shard(self, module: nn.Module) -> None:
        for network in networks_in(module):
            for block in family_of(network).blocks(network):
                fully_shard(block, mesh=self.mesh)
        fully_shard(module, mesh=self.mesh)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Autocast where the run is bf16. In pieces, weights are whole for a moment: their casts are not kept."""
        kept = self.kind in (EngineKind.single, EngineKind.ddp, EngineKind.zero2)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision is Precision.bf16, cache_enabled=kept
        ):
            yield

    # ---- processes ----------------------------------------------------------------------------------

    def share(self, batch_size: int) -> range:
        """This process's places in a batch. Raises SprintError where the batch does not divide evenly."""
        return share_of(batch_size, self.rank, self.processes)

    def average(self, value: Tensor) -> Tensor:
        """Mean over processes."""
        return self.accelerator.reduce(value.to(self.device), "mean")

    def max_over_ranks(self, number: int) -> int:
        """The largest of the processes' numbers, on every process; between hosts: no GPU is waited for."""
        if self.processes == 1:
            return number
        word = torch.tensor([number])
        dist.all_reduce(word, dist.ReduceOp.MAX, group=self.hosts)
        return int(word)

    def broadcast_from_main(self, work: Callable[[], str | None]) -> str | None:
        """What `work` gives on the main process, on every process; if it raises SprintError there, all do."""
        said: list = [None, None]
        if self.main_process:
            try:
                said[0] = work()
            except SprintError as error:
                said[1] = error
        if self.processes > 1:
            dist.broadcast_object_list(said, src=0, group=self.hosts)
        word, error = said
        if error:
            raise error
        return word

    def broadcast_numbers(self, numbers: np.ndarray) -> np.ndarray:
        """The main process's whole numbers, on every process; of one shape everywhere."""
        if self.processes == 1:
            return numbers
        tensor = torch.from_numpy(numbers.astype(np.int64))
        dist.broadcast(tensor, src=0, group=self.hosts)
        return tensor.numpy().astype(numbers.dtype)

    def new_gloo_group(self) -> dist.ProcessGroup | None:
        """A new group of all processes, between hosts, for one user's own collectives; None for one process."""
        return dist.new_group(backend="gloo", timeout=HOST_TIMEOUT) if self.processes > 1 else None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a process that dies is named by the others, which then stop too. Raises SprintError."""
        heartbeat = Heartbeat(self.rank, self.processes, self.hosts)
        with heartbeat.explained():
            yield
        heartbeat.stop()

    def wait(self) -> None:
        if self.processes > 1:
            dist.barrier(group=self.hosts)


def not_all_met(processes: int, timeout: int) -> str:
    """Why a run cannot begin."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return (
        f"rank {os.environ.get('RANK')}: not all {processes} processes met at {where} within {timeout} s; look whether "
        "each was started, and can reach that address (timeout=… waits longer)"
    )


def keep_time_in_float32(module: nn.Module) -> None:
    """Shield the time embedders of all networks inside from autocast: bf16 has no number from 0.500 to 0.504."""
    for network in networks_in(module):
        family_of(network).keep_time_in_float32(network)


@torch.no_grad()
def warm_up_fsdp_root(network: ModelMixin) -> None:
    """FSDP2 learns at a root's first forward which units it has; later ones may stop at an early block."""
    teacher, device = family_of(network), next(network.parameters()).device
    sizes, like = teacher.sizes(network.config), {"device": device, "dtype": network.dtype}
    x_fm = torch.zeros(1, sizes.channels, sizes.side, sizes.side, **like)
    text, mask = (
        torch.zeros(1, 1, sizes.text_width, **like),
        torch.ones(1, 1, dtype=torch.long, device=device),
    )
    teacher.velocity(network, x_fm, torch.zeros(1, device=device), text, mask, None, DENSE_TIME)
