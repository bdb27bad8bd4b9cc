"""Forked for test_dual_engines.py: an sCM loss by dual numbers under every engine."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from sprint.base.ending import run_to_end
from sprint.engine.recompute import recompute_in_backward
from sprint.maths.dual import RULES, value_and_tangent, value_of
from sprint.maths.losses import consistency_loss, consistency_tangent, normalise_tangent, tangent_inputs
from sprint.maths.trigflow import SIGMA_DATA
from sprint.models.student import Student
from tests.tiny import tiny_batch, tiny_network

SIZE = 4


class Pass(nn.Module):
    """The student's F and log-variance in one call of the outermost module, where the engines' hooks sit."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student = Student(tiny_network(guidance_embeds=True)).train()
        nn.init.normal_(self.student.logvar.weight, std=0.1)

    def forward(self, x_hat, t, text, mask, guidance):
        return self.student(x_hat, t, text, mask, guidance), self.student.log_variance(value_of(t), guidance)


def scm_loss(module: Callable, where: slice, derive: Callable = value_and_tangent) -> Tensor:
    """On that part of the batch of SIZE."""
    x_t, text, mask = (z[where] for z in tiny_batch(SIZE))
    D = tiny_batch(SIZE, seed=1).latent[where]
    t, guidance = torch.tensor([0.2, 0.7, 1.1, 1.4])[where], torch.tensor([4.0, 4.5, 5.0, 4.0])[where]
    logvar = []

    def F(x_hat, t):
        out, of_t = module(x_hat, t, text, mask, guidance)
        logvar.append(of_t)
        return out

    value, tangent = derive(F, x_t / SIGMA_DATA, t, *tangent_inputs(t, D))
    if derive is functional:  # leaves jvp's wrappers behind
        logvar.append(module(x_t / SIGMA_DATA, t, text, mask, guidance)[1])
    F_minus = value.detach()
    g = normalise_tangent(consistency_tangent(F_minus, tangent, D, x_t, t, r=1.0))
    return consistency_loss(value, F_minus, g, logvar[-1], t)


def functional(F, x_hat, t, v_x, v_t):
    """The trap: torch.func.jvp in one pass, with gradients."""
    with sdpa_kernel(SDPBackend.MATH):
        value, tangent = torch.func.jvp(F, (x_hat, t), (v_x, v_t))
    return value, tangent.detach()


def counted(module: nn.Module) -> list[str]:
    """Fills while the module runs: one entry for every call of a block, saying what it got."""
    calls: list[str] = []
    for block in module.student.network.transformer_blocks:
        block.register_forward_pre_hook(lambda block, args: calls.append(type(args[0]).__name__))
    return calls


def result(loss: Tensor, gradients: dict[str, Tensor], calls: list[str]) -> dict:
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return {"loss": loss / dist.get_world_size(), "gradients": gradients, "calls": calls}


def own_share() -> slice:
    share = SIZE // dist.get_world_size()
    return slice(share * dist.get_rank(), share * (dist.get_rank() + 1))


def local_gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def ddp(derive: Callable = value_and_tangent, unwrapped: bool = False) -> dict:
    module = Pass()
    calls = counted(module)
    wrapped = DistributedDataParallel(module)
    loss = scm_loss(wrapped.module if unwrapped else wrapped, own_share(), derive)
    loss.backward()
    return result(loss, local_gradients(module), calls)


def fsdp2(recompute: bool = False) -> dict:
    module = Pass()
    calls = counted(module)
    network = module.student.network
    if recompute:
        network.enable_gradient_checkpointing(gradient_checkpointing_func=recompute_in_backward)
    for block in network.transformer_blocks:
        fully_shard(block)
    fully_shard(module)
    tangents_of_silu.clear()
    loss = scm_loss(module, own_share())
    forward = len(tangents_of_silu)
    loss.backward()
    gradients = {name: p.grad.full_tensor() for name, p in module.named_parameters()}
    return result(loss, gradients, calls) | {"tangents": (forward, len(tangents_of_silu) - forward)}


def zero(stage: int) -> dict:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    module = Pass()
    calls = counted(module)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": SIZE // dist.get_world_size(),
            "zero_allow_untested_optimizer": True,
            # its own linear is an autograd.Function, which cannot save a Dual
            "zero_optimization": {"stage": stage, "memory_efficient_linear": False},
        },
    )
    loss = scm_loss(engine, own_share())
    engine.backward(loss)
    gradients = {name: safe_get_full_grad(p).clone() for name, p in module.named_parameters()}
    return result(loss, gradients, calls)


tangents_of_silu: list[None] = []


def count_tangents_of_silu() -> None:
    rule = RULES["silu"]
    RULES["silu"] = lambda *args: tangents_of_silu.append(None) or rule(*args)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    count_tangents_of_silu()
    results = {
        "trap": ddp(functional, unwrapped=True),
        "unwrapped": ddp(unwrapped=True),
        "ddp": ddp(),
        "fsdp2": fsdp2(),
        "fsdp2, recompute": fsdp2(recompute=True),
        "zero-2": zero(2),
        "zero-3": zero(3),
    }
    if dist.get_rank() == 0:
        torch.save(results | {"processes": dist.get_world_size()}, folder / "result.pt")
    dist.barrier()


if __name__ == "__main__":
    run_to_end(lambda: main(Path(sys.argv[1])))
