"""An update queues its work and reads nothing back: the host may run ahead of the device."""

import math
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sprint.data.batching import encode
from sprint.recipe.schema import OptimizerKind
from sprint.train.adapt import AdaptStage
from sprint.train.distill import DistillStage
from tests.sample.test_generate import mini_family
from tests.tiny import LATENT, tiny_batch, tiny_network, tiny_null, tiny_recipe
from tests.train.test_loop import Squares

# operations whose result or whose shape depends on values, so that the host has to wait for them
READING_OPERATIONS = {
    *("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "allclose", "masked_select", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive", "_assert_async"),
}
READING_METHODS = {
    "tolist",
    "numpy",
    "cpu",
    "item",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__array__",
}


class Operations(TorchDispatchMode):
    def __init__(self, reads: list[str]):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple)
        if by_mask and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.reads.append(f"{name} by a mask")
        if name in READING_OPERATIONS:
            self.reads.append(name)
        return function(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    def __init__(self, reads: list[str]):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in READING_METHODS:
            self.reads.append(name)
        if name in ("tensor", "as_tensor") and (kwargs or {}).get("device") is not None:
            self.reads.append(f"{name} of a number, copied to the device")  # use full, which copies nothing
        return function(*args, **(kwargs or {}))


@contextmanager
def reads_of_the_device():
    """A list that fills with every way in which the host waits for a tensor's values."""
    reads: list[str] = []
    with Methods(reads), Operations(reads):
        yield reads


@pytest.mark.parametrize(
    "read",
    [
        lambda x: bool(x.sum() > 0),
        lambda x: float(x.sum()),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: max(0.0, x.sum()),
        lambda x: [0, 1, 2][x.long().sum()],
        lambda x: torch.as_tensor(2.0, device=x.device),
    ],
)
def test_a_read_is_seen(read: Callable):
    with reads_of_the_device() as reads:
        read(torch.tensor([0.0, 1.0]))
    assert reads


def test_work_that_stays_on_the_device_is_not():
    x = torch.tensor([0.0, 1.0], requires_grad=True)
    with reads_of_the_device() as reads:
        (torch.where(x > 0, x, 2 * x)[torch.tensor([0, 1])].sum() / 2).backward()
    assert reads == []


def make_stage(name: str, engine, kind: OptimizerKind):
    recipe = tiny_recipe()
    recipe.log_every, recipe.micro_batch_size = 5, 4
    for settings in (recipe.adapt.optimizer, recipe.distill.optimizer, recipe.distill.adversarial.optimizer):
        settings.kind, settings.weight_decay = kind, 0.01
        settings.betas = (0.9, 0.999, 0.9999) if kind is OptimizerKind.came else (0.9, 0.99)
    if name == "adapt":
        return AdaptStage(recipe, engine, tiny_network(), tiny_null())
    return DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)


@pytest.mark.parametrize("kind", list(OptimizerKind))
@pytest.mark.parametrize("name", ["adapt", "distill"])
def test_an_update_reads_nothing_from_the_device(name, kind, engine):
    """Four of each stage, in two parts; G, D, G, D of the second; the third without a finite gradient."""
    stage, batch = make_stage(name, engine, kind), tiny_batch()
    bad = batch._replace(latent=torch.full((8, *LATENT), math.nan))
    with reads_of_the_device() as reads:
        means = [stage.update(step, bad if step == 2 else batch) for step in range(4)]
    assert reads == []
    with reads_of_the_device() as reads:
        read = [each.read(engine) for each in means]
    assert reads == ["tolist"] * 4
    assert [row["skipped"] for row in read] == ([0, 0, 1, 1] if name == "adapt" else [0, 0, 1, 0])


def test_encoding_a_batch_reads_nothing_from_the_device():
    family, samples = mini_family(), Squares().samples(range(4))
    with reads_of_the_device() as reads:
        encode(samples, family)
    assert reads == []
