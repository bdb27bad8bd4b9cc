"""What each engine holds, against torch's own sharding in one process that stands for the first of eight."""

import json
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sprint.engine.zero import BUCKET
from sprint.models.sana.presets import meta_network, transformer_config
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import EngineKind, OptimizerKind, Precision
from sprint.train.plan.activations import FP32
from sprint.train.plan.engines import (
    GRADIENTS,
    WEIGHTS,
    WHOLE,
    ZERO_COPY,
    Layout,
    count,
    layout_of,
    rows_of,
    trained,
)
from sprint.train.plan.networks import build_networks
from sprint.train.plan.page import page
from sprint.train.plan.plan import (
    distill_memory,
    dry_run,
    gpu_misfits,
    totals_of,
    with_engine,
)
from tests.launch import forked
from tools.bench import plan_table

RECIPES = Path(__file__).parents[3] / "recipes"
CAME, ADAMW = OptimizerKind.came, OptimizerKind.adamw


@pytest.fixture(params=[0, 7], ids=["first", "last"])
def mesh(request) -> Iterator[DeviceMesh]:
    """Eight processes, of which this is one; nothing is sent, and what should arrive is whatever memory holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=8)
        try:
            yield init_device_mesh("cpu", (8,))
        finally:
            dist.destroy_process_group()


def shard(network: SanaTransformer2DModel, mesh: DeviceMesh) -> None:
    for block in network.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


# ---- pieces -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["0.6b", "tiny"])
def test_rows_are_those_of_fully_shard(mesh, name):
    network = meta_network(transformer_config(name, qk_norm=True, guidance_embeds=True))
    shapes = [p.shape for p in network.parameters()]
    shard(network, mesh)
    local = [p.to_local().shape for p in network.parameters()]
    piece = Layout(EngineKind.fsdp2, 8).piece(shapes)
    if mesh.get_local_rank() == 0:
        assert local == [rows_of(shape, 8) for shape in shapes]
        assert piece == sum(shape.numel() for shape in local)
    else:  # never more than the first has, and some tables have fewer rows than there are processes
        assert sum(shape.numel() for shape in local) < piece


def test_pieces_by_hand():
    shapes = [torch.Size((10, 3)), torch.Size((7,)), torch.Size((1, 5, 2))]  # 47 numbers
    assert Layout(EngineKind.ddp).piece(shapes) == 47
    assert Layout(EngineKind.fsdp2, 4).piece(shapes) == 3 * 3 + 2 + 10  # whole rows
    assert Layout(EngineKind.zero2, 4).piece(shapes) == 12  # 48 / 4: one line, padded to pairs
    assert Layout(EngineKind.zero2, 3).piece(shapes) == 16
    assert Layout(EngineKind.zero3, 4).piece(shapes) == 8 + 2 + 3  # each by itself


def test_engines_by_hand():
    network = meta_network(transformer_config("tiny"))
    total, block = count(network), count(network.transformer_blocks[0])
    outside = total - 4 * block

    def parts(engine: EngineKind, kind: OptimizerKind = ADAMW) -> dict[str, float]:
        pieces = 1 if engine in (EngineKind.single, EngineKind.ddp) else 8
        return trained(network, kind, Precision.bf16, Layout(engine, pieces))

    whole = {
        WEIGHTS: 4 * total,
        GRADIENTS: 4 * total,
        "optimizer state (adamw, fp32)": 8 * total,
        "bf16 copies": 2 * total,
    }
    assert parts(EngineKind.single) == parts(EngineKind.ddp) == whole
    fsdp2 = parts(EngineKind.fsdp2)
    assert fsdp2[WHOLE] == 4 * (outside + 4 * block)
    assert (fsdp2["bf16 copies"], fsdp2["bf16 copies, recomputed"]) == (2 * total, 2 * block)
    zero2, zero3 = parts(EngineKind.zero2), parts(EngineKind.zero3)
    assert zero2[WEIGHTS] == 4 * total and "bf16 copies, recomputed" not in zero2
    assert zero2[GRADIENTS] == zero2[ZERO_COPY] == pytest.approx(total / 2, rel=1e-4)
    assert zero2["optimizer state (adamw, fp32)"] == 2 * zero2[GRADIENTS]
    assert zero2[WHOLE] == 4 * 50_000_000 and zero3[WHOLE] == zero2[WHOLE] + 4 * total
    assert zero3[WEIGHTS] == zero3[GRADIENTS] == zero3[ZERO_COPY] == pytest.approx(total / 2, rel=1e-3)
    came = parts(EngineKind.fsdp2, CAME)["optimizer state (came, fp32)"]
    # the momentum, and statistics whose columns are whole
    assert fsdp2[WEIGHTS] < came < 1.25 * fsdp2[WEIGHTS]


# ---- what is whole for a moment ---------------------------------------------------------------------


class Held(TorchDispatchMode):
    """Bytes of all storages alive, by their size at each operation: FSDP2 empties some and keeps them."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.alive = {t.untyped_storage()._cdata: weakref.ref(t.untyped_storage()) for t in tensors}
        self.peak = self.now()

    def now(self) -> int:
        storages = [reference() for reference in self.alive.values()]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.alive[storage._cdata] = weakref.ref(storage)
        self.peak = max(self.peak, self.now())
        return out


@pytest.mark.parametrize("mesh", [0], indirect=True)
def test_what_fully_shard_gathers_is_planned(mesh):
    """One picture of one token: nearly all that is there is weights and gradients."""
    depth = 6
    network = SanaTransformer2DModel(**transformer_config("tiny", qk_norm=True) | {"num_layers": depth})
    parts = trained(network, ADAMW, Precision.fp32, Layout(EngineKind.fsdp2, 8))
    shard(network, mesh)
    with Held([p.to_local() for p in network.parameters()]) as held:
        assert held.now() == parts[WEIGHTS]
        for _ in range(2):  # in the second there are gradients from the start
            network(torch.randn(1, 8, 1, 1), torch.randn(1, 1, 128), torch.ones(1)).sample.sum().backward()
    planned = parts[WEIGHTS] + parts[GRADIENTS] + parts[WHOLE]
    assert planned == pytest.approx(held.peak, rel=0.1)
    assert planned < held.peak  # the rest is activations


def test_what_deepspeed_holds_is_planned(tmp_path):
    """Between backward and update: ZeRO-2 has let its bucket go by then, ZeRO-3 never does."""
    pytest.importorskip("deepspeed")
    forked("tests.train.plan.processes", 2, str(tmp_path))
    held = json.loads((tmp_path / "held.json").read_text())
    network, bucket = meta_network(transformer_config("tiny")), FP32 * BUCKET
    for engine, freed in ((EngineKind.zero2, bucket), (EngineKind.zero3, 0)):
        parts = trained(network, ADAMW, Precision.fp32, Layout(engine, 2))
        weights = FP32 * count(network)
        difference = held[engine.value] - (sum(parts.values()) - freed)
        assert abs(difference) < 0.05 * weights, engine


# ---- the table --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_engines_of_a_recipe():
    recipe = load_recipe(RECIPES / "4.8b.yaml")
    networks = build_networks(recipe)

    def total(engine: EngineKind, gpus: int, shard_teacher: bool = False) -> float:
        return totals_of(
            distill_memory(with_engine(recipe, engine, shard_teacher), networks, gpus)
        ).recomputed

    for engine in (EngineKind.fsdp2, EngineKind.zero2, EngineKind.zero3):
        assert total(engine, 8) > total(engine, 32) > total(engine, 256)
    student, teacher = count(networks.student), count(networks.adapted)
    saved = total(EngineKind.ddp, 8) - total(EngineKind.fsdp2, 8)
    # seven eighths, and the bf16 copies
    assert saved == pytest.approx((3 * 4 * 7 / 8 + 2) * student, rel=0.05)
    saved = total(EngineKind.fsdp2, 8) - total(EngineKind.fsdp2, 8, shard_teacher=True)
    assert saved == pytest.approx(2 * teacher * 7 / 8, rel=0.15)


def test_shard_size_is_the_number_of_pieces():
    recipe = load_recipe(RECIPES / "4.8b.yaml", ["shard_size=8"])
    assert layout_of(recipe, 256) == layout_of(recipe, 8) == Layout(EngineKind.fsdp2, 8)
    assert layout_of(load_recipe(RECIPES / "4.8b.yaml"), 256) == Layout(EngineKind.fsdp2, 256)


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        (
            "0.6b",
            [],
            [
                "256 GPUs: distill.batch_size = 512 leaves each of 256 processes a share of 2, which "
                "distill.adversarial.neighbours = 4 does not divide; "
                "set that to 2, or distill.batch_size to 1024"
            ],
        ),
        ("0.6b", ["distill.adversarial.neighbours=2"], []),
        ("0.6b", ["distill.batch_size=1024"], []),
        ("0.6b", ["distill.adversarial.weight=0"], []),
        ("tiny", [], []),
        (
            "tiny",
            ["engine=ddp", "adapt.steps=0"],
            [
                "32 GPUs: distill.batch_size = 32 leaves each of 32 processes a share of 1, which "
                "distill.adversarial.neighbours = 4 does not divide; set distill.batch_size to 128",
                "256 GPUs: distill.batch_size = 32 does not divide over 256 processes",
            ],
        ),
        (
            "0.6b",
            ["distill.steps=0", "adapt.batch_size=100"],
            [
                f"{gpus} GPUs: adapt.batch_size = 100 does not divide over {gpus} processes"
                for gpus in (8, 32, 256)
            ],
        ),
    ],
)
def test_batches_that_do_not_divide_are_named(name, overrides, expected):
    assert list(gpu_misfits(load_recipe(RECIPES / f"{name}.yaml", overrides))) == expected


@pytest.mark.slow
def test_the_page_compares_engines():
    plan = dry_run(load_recipe(RECIPES / "4.8b.yaml"))
    lines = page(plan)
    assert len(plan.misfits) == 1 and plan.misfits[0] in lines
    start = next(i for i, line in enumerate(lines) if line.startswith("# every engine"))
    table = {line[:38].strip(): line[38:].split() for line in lines[start + 1 : lines.index("", start)]}
    assert table["GPUs"] == ["1", "8", "32", "256"]
    assert table["single"][1:] == ["-", "-", "-"]
    fits = plan.engines["fsdp2"][8].recomputed / 2**30
    assert 40 < 1.2 * fits < 80
    assert table["fsdp2, recomputed"][:3] == ["-", f"{fits:.1f}", "(80)"]
    ddp = plan.engines["ddp"][8].recomputed / 2**30
    assert ddp > 80 and table["ddp, recomputed"][1] == f"{ddp:.1f}"
    assert "(" not in table["ddp, recomputed"][2]
    # it fits, with nothing to spare
    assert 80 / 1.2 < plan.engines["zero2, AdamW"][8].recomputed / 2**30 < 80
    assert "(" not in table["zero2, AdamW, recomputed"][2]


@pytest.mark.slow
def test_the_table_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tools.bench.measure.RESULTS", tmp_path)
    monkeypatch.setattr(plan_table, "SIZES", ("tiny",))
    assert plan_table.main([]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| GiB on each of so many GPUs | TINY, 8 | 32 | 256 |"
    rows = json.loads((tmp_path / "plan-engines.json").read_text())["rows"]
    (fsdp2,) = [row for row in rows if (row["engine"], row["gpus"]) == ("fsdp2", 8)]
    recipe = with_engine(load_recipe(RECIPES / "tiny.yaml"), EngineKind.fsdp2, False)
    memory = totals_of(distill_memory(recipe, build_networks(recipe), 8))
    assert (fsdp2["kept"], fsdp2["recomputed"]) == tuple(map(round, memory))
    assert f"| fsdp2 | {memory.recomputed / 2**30:.1f} |" in table[3]
