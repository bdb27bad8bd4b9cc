"""Dual numbers through the hooks of DDP, FSDP2, ZeRO-2 and ZeRO-3: two processes compute what one does."""

import pytest
import torch

from sprint.maths.dual import Dual
from tests.launch import forked
from tests.maths.dual_processes import SIZE, Pass, counted, scm_loss
from tests.tiny import DEPTH
from tests.tolerance import assert_all_close, near, of_network

TOLERANCE = of_network(Pass(), passes=4)  # forward, tangent, and backward twice
ENGINES = ["ddp", "fsdp2", "fsdp2, recompute", "zero-2", "zero-3"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """What two processes found, each with half of the batch; gradients are the reduced and gathered ones."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("engines")
    forked("tests.maths.dual_processes", 2, str(folder))
    results = torch.load(folder / "result.pt", weights_only=True)
    assert results["processes"] == 2
    return results


@pytest.fixture(scope="module")
def ours():
    """One process with the whole batch."""
    module = Pass()
    calls = counted(module)
    loss = scm_loss(module, slice(0, SIZE))
    loss.backward()
    return {
        "loss": loss.detach(),
        "gradients": {name: p.grad for name, p in module.named_parameters()},
        "calls": calls,
    }


def error(result: dict, expected: dict) -> float:
    """Of all gradients together, relative."""
    assert result["gradients"].keys() == expected["gradients"].keys()
    square = sum((result["gradients"][name] - g).square().sum() for name, g in expected["gradients"].items())
    return (square / sum(g.square().sum() for g in expected["gradients"].values())).sqrt().item()


@pytest.mark.parametrize("engine", ENGINES)
def test_loss_and_gradients_are_one_processs(theirs, ours, engine):
    assert theirs[engine]["loss"].item() == near(ours["loss"].item(), TOLERANCE)
    assert error(theirs[engine], ours) < TOLERANCE
    assert all(gradient.norm() > 0 for gradient in ours["gradients"].values())
    assert_all_close(theirs[engine]["gradients"], ours["gradients"], TOLERANCE)


@pytest.mark.parametrize("engine", ENGINES)
def test_hooks_fire_once_a_block_and_see_duals(theirs, ours, engine):
    """One pass: two would call each block twice. A recomputation in the backward calls it with plain tensors."""
    recomputed = ["Tensor"] * DEPTH if engine == "fsdp2, recompute" else []
    assert ours["calls"] == [Dual.__name__] * DEPTH
    assert theirs[engine]["calls"] == ours["calls"] + recomputed


def test_fsdp2_recomputes_no_tangent(theirs):
    forward, backward = theirs["fsdp2, recompute"]["tangents"]
    assert forward > 0 and backward == 0


@pytest.mark.parametrize("engine", ["trap", "unwrapped"])
def test_what_goes_round_the_wrapper_is_not_synchronised(theirs, ours, engine):
    """torch.func.jvp on DDP's inner module, and a Dual too: that the tests above can fail.

    Called through the wrapper, as in "ddp", a Dual's gradients are synchronised.
    """
    assert error(theirs[engine], ours) > 0.1
