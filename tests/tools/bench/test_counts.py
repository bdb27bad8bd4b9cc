"""The benchmarks that count: bytes, FLOPs and growth. Known answers first, then each tool end to end at toy size."""

import json
import time
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn import functional as nnf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sprint.base.products import bf16_linear, onednn_linear
from sprint.models.sana.family import Sana
from sprint.recipe.schema import Precision
from sprint.train.plan.networks import networks_of
from sprint.train.plan.work import Work, work_of
from tests.tiny import tiny_batch, tiny_network
from tools.bench import flops as bench_flops
from tools.bench import growth as bench_growth
from tools.bench import measure, operators, peaks
from tools.bench import memory as bench_memory

TINY = measure.Request("tiny", 2, "cpu", Precision.fp32)


@pytest.fixture(autouse=True)
def on_cpu(tmp_path, monkeypatch):
    """accelerate forgets device and precision before and after; results go elsewhere."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def counted(run) -> tuple[int, int, int]:
    """FLOPs, bytes and number of operations of a call."""
    counter = bench_flops.Counts()
    with counter:
        run()
    operations = [each for part in counter.operations.values() for each in part]
    return sum(each.flops for each in operations), sum(each.bytes for each in operations), len(operations)


# ---- FLOPs and bytes of single operations --------------------------------------------------------------


def test_a_product_and_its_backward():
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    assert counted(lambda: a @ b) == (2 * 3 * 5 * 7, 4 * (15 + 35 + 21), 1)
    y = a @ b
    flops, _, _ = counted(lambda: y.backward(torch.ones(3, 7)))
    assert flops == 2 * (2 * 3 * 5 * 7)
    bias = torch.randn(7)
    assert counted(lambda: torch.addmm(bias, a.detach(), b.detach()))[0] == 2 * 3 * 5 * 7
    assert counted(lambda: torch.randn(2, 3, 5) @ torch.randn(5))[0] == 2 * 2 * 3 * 5


def test_the_engines_linear_layer_counts_with_gradients_and_without():
    x, weight = torch.randn(4, 3, 5), torch.randn(7, 5)
    with_gradients = counted(lambda: onednn_linear(x, weight.clone().requires_grad_()))[0]
    with torch.no_grad():
        assert counted(lambda: onednn_linear(x, weight))[0] == with_gradients == 2 * 4 * 3 * 5 * 7


@pytest.mark.parametrize("groups", [1, 6])
def test_a_convolution_and_its_backward_know_groups(groups):
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    weight = torch.randn(12, 6 // groups, 3, 3, requires_grad=True)
    one = 2 * (2 * 12 * 8 * 8) * (6 // groups * 9)
    assert counted(lambda: nnf.conv2d(x, weight, padding=1, groups=groups))[0] == one
    y = nnf.conv2d(x, weight, padding=1, groups=groups)
    assert counted(lambda: y.backward(torch.ones_like(y)))[0] == 2 * one
    weight.requires_grad_(False)
    y = nnf.conv2d(x, weight, padding=1, groups=groups)
    assert counted(lambda: y.backward(torch.ones_like(y)))[0] == one


def test_fused_attention_counts_its_two_products():
    q, k = torch.randn(2, 4, 10, 16), torch.randn(2, 4, 6, 16)
    flops, _, _ = counted(lambda: nnf.scaled_dot_product_attention(q, k, k))
    assert flops == 2 * (2 * (2 * 4 * 10 * 16 * 6))


def test_bytes_are_what_is_read_and_written():
    x, one = torch.zeros(100), torch.zeros(1)
    assert counted(lambda: x.view(10, 10).t()) == (0, 0, 0)
    assert counted(lambda: torch.empty(1000))[1] == 0
    assert counted(lambda: x + 1)[1] == 800
    assert counted(lambda: x.add_(1))[1] == 800
    assert counted(lambda: one.expand(100) + x)[1] == 4 + 400 + 400
    assert counted(lambda: torch.cat([x, x]))[1] == 400 + 400 + 800


def test_a_network_has_the_flops_that_torch_counts():
    network, batch = tiny_network(), tiny_batch()

    def forward():
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            network(batch.latent, batch.text, torch.ones(8), encoder_attention_mask=batch.mask)

    with FlopCounterMode(display=False) as torchs:
        forward()
    assert counted(forward)[0] == torchs.get_total_flops() > 0


# ---- the step by part ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counts() -> dict:
    return bench_flops.counts_of(bench_memory.Case(TINY, "distill", False), traced=False)


def flops_by_part(operations: dict) -> dict[str, int]:
    return {name: sum(each.flops for each in part) for name, part in operations.items()}


def test_every_part_has_its_place(counts):
    for phase in ("G", "D"):
        assert counts[phase].keys() == {"other", *bench_flops.PARTS[phase].values()}
    generator, discriminator = (flops_by_part(counts[phase]) for phase in ("G", "D"))
    assert generator["other"] == discriminator["other"] == 0
    sample = generator["student, one-step sample"]
    assert sample == discriminator["student, one-step sample"]
    tangent = generator["student, value and tangent"] - sample
    assert 0.85 * sample < tangent < 1.05 * sample  # all but what depends on the text or on neither
    assert generator["features of data"] == pytest.approx(generator["features of the sample"], rel=0.1)
    assert generator["heads"] / 2 == pytest.approx(discriminator["heads"] / 3, rel=0.01)  # kinds of picture
    assert 1.8 * sample < generator["backward of sCM"] < 2.1 * sample


def planned_work(request: measure.Request, depth: int = 0) -> Work:
    """Of the benchmark's recipe for that network."""
    size, case = measure.SIZES[request.network], bench_memory.Case(request, "distill", False, depth=depth)
    tokens = size.config["sample_size"] ** 2
    networks = networks_of(Sana(), size.config | {"qk_norm": None}, len(size.taps), tokens, depth)
    return work_of(bench_memory.recipe_of(case), networks)


def test_the_work_of_the_plan_is_what_a_whole_update_computes(counts):
    """But for what is read of a text, which the plan counts at every pass and a run computes once."""
    work, pictures = planned_work(TINY), TINY.batch
    generator, discriminator = (sum(flops_by_part(counts[phase]).values()) / pictures for phase in ("G", "D"))
    assert 1 <= (work.consistency() + work.adversarial()) / generator < 1.05
    assert 1 <= work.discriminator() / discriminator < 1.05


@pytest.mark.slow
def test_the_work_of_a_deeper_student_is_what_its_update_computes(counts):
    deep = bench_flops.counts_of(bench_memory.Case(TINY, "distill", False, depth=8), traced=False)
    work, pictures = planned_work(TINY, depth=8), TINY.batch
    generator, discriminator = (sum(flops_by_part(deep[phase]).values()) / pictures for phase in ("G", "D"))
    assert 1 <= (work.consistency() + work.adversarial()) / generator < 1.05
    assert 1 <= work.discriminator() / discriminator < 1.05
    part = "features of data"  # the teacher's, which is as it was
    assert flops_by_part(deep["G"])[part] == flops_by_part(counts["G"])[part]


@pytest.mark.slow
def test_the_work_of_the_plan_is_what_was_counted_of_the_real_size():
    counted = json.loads((measure.ROOT / "tools" / "results" / "bench_flops_0.6b_cpu.json").read_text())
    work = planned_work(TINY._replace(network="0.6b"))
    assert work.student * 32 == counted["D"]["student, one-step sample"]["flops"]
    generator, discriminator = (counted[phase]["all"]["flops"] / 32 for phase in ("G", "D"))
    assert work.consistency() + work.adversarial() == pytest.approx(generator, rel=0.02)
    assert work.discriminator() == pytest.approx(discriminator, rel=0.03)


@pytest.mark.slow
def test_tensors_without_memory_have_the_same_flops(monkeypatch):
    tiny = measure.SIZES["tiny"]
    monkeypatch.setitem(
        measure.SIZES, "one block", replace(tiny, config=tiny.config | {"num_layers": 1}, taps=(0,))
    )
    case = bench_memory.Case(TINY._replace(network="one block"), "distill", False)
    real, traced = (bench_flops.counts_of(case, traced) for traced in (False, True))
    for phase in ("G", "D"):
        assert flops_by_part(traced[phase]) == flops_by_part(real[phase])


def test_floors_of_known_operations():
    operation, speeds = bench_flops.Operation, bench_flops.Speeds({"float32": 50.0, "bfloat16": 100.0}, 20.0)
    operations = {"a": [operation(100, 10), operation(0, 40)], "b": [operation(50, 1000, "bfloat16")]}
    seconds = {"a": [2.0, 4.0], "b": [30.0, 28.0]}
    table = bench_flops.table_of(operations, speeds, seconds)
    assert table["a"]["compute_seconds"] == 2.0 and table["b"]["compute_seconds"] == 0.5
    assert table["a"]["moved_seconds"] == 2.5 and table["b"]["moved_seconds"] == 50.0
    assert table["a"]["floor_seconds"] == 2.0 + 2.0
    assert table["b"]["floor_seconds"] == 50.0 and table["all"]["floor_seconds"] == 54.0
    assert table["a"]["seconds"]["median"] == 3.0 and table["all"]["seconds"]["median"] == 32.0
    assert table["all"]["mfu"] == pytest.approx(2.5 / 32)
    assert table["all"]["share_of_bandwidth"] == pytest.approx(52.5 / 32)
    assert table["a"]["share_of_floor_reached"] == pytest.approx(4 / 3)
    assert table["all"]["flops"] == 150 and table["all"]["bytes"] == 1050


def test_what_is_multiplied_in_bf16_is_counted_in_bf16():
    x, weight = torch.randn(4, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    counter = bench_flops.Counts()
    with counter:
        bf16_linear(x, weight).sum().backward()
    made = counter.operations["other"]
    products = [each for each in made if each.flops]
    assert [each.flops for each in products] == 3 * [2 * 4 * 5 * 7]
    assert bench_flops.dtypes_multiplied({"G": {"other": made}}) == ["bfloat16"]
    assert {each.dtype for each in made} == {"bfloat16", "float32"}


def test_every_dtype_has_its_own_fastest_product_and_the_copy_moves_both_ways():
    shapes = [*peaks.product_speeds(TINY, "bfloat16", rounds=1)]
    speeds = peaks.product_speeds(TINY, "float32", rounds=1)
    assert [*speeds] == shapes and min(speeds.values()) > 0
    assert peaks.copy_speed("cpu", rounds=1) > 0


def test_the_profile_names_what_takes_the_time():
    a, b = torch.randn(1000, 1000), torch.randn(1000, 1000)
    a @ b
    found = operators.operators_of(lambda: [*(a @ b for _ in range(3)), a[:9] + b[:9]], torch.device("cpu"))
    rows = {row["operator"]: row for row in found["operators"]}
    assert rows["aten::mm"]["calls"] == 3 and rows["aten::add"]["calls"] == 1
    assert rows["aten::mm"]["share"] > rows["aten::add"]["share"] > 0
    assert [*rows][-2:] == [operators.REST, operators.BETWEEN]
    assert sum(row["seconds"] for row in rows.values()) == pytest.approx(found["seconds"])


def test_what_lies_between_operators_is_told():
    def call():
        torch.ones(3)
        time.sleep(0.05)

    *_, between = operators.operators_of(call, torch.device("cpu"))["operators"]
    assert between["seconds"] > 0.04 and between["share"] > 0.5


# ---- growth -------------------------------------------------------------------------------------------


def test_exponents_of_known_growth():
    assert bench_growth.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert bench_growth.exponent([16, 64], [5, 5]) == pytest.approx(0)


@pytest.mark.slow
def test_flops_grow_linearly():
    """All of them: attention over image tokens is linear, and text tokens stay."""
    for axis, low in (("tokens", 0.98), ("batch", 1.0 - 1e-6), ("depth", 0.95)):
        sizes = bench_growth.AXES[axis][:2]
        runs = [bench_growth.pass_at(bench_growth.START._replace(**{axis: size}), 64, TINY) for size in sizes]
        assert low <= bench_growth.exponent(sizes, [*map(bench_growth.flops_of, runs)]) <= 1 + 1e-6, axis


# ---- the tools, end to end ------------------------------------------------------------------------------


@pytest.mark.slow
def test_flops_are_measured(tmp_path, capsys):
    assert bench_flops.main(["--network", "tiny", "--batch", "2", "--rounds", "2"]) == 0
    said = capsys.readouterr().out
    assert "G update" in said and "of floor" in said and "bench_flops_tiny_cpu.json" in said
    record = json.loads((tmp_path / "bench_flops_tiny_cpu.json").read_text())
    for phase in ("G", "D"):
        *parts, everything = record[phase].values()
        for key in ("flops", "bytes", "floor_seconds"):
            assert everything[key] == pytest.approx(sum(part[key] for part in parts))
        assert (
            everything["floor_seconds"] >= max(everything["compute_seconds"], everything["moved_seconds"]) > 0
        )
        assert record["profile"][phase]["operators"][0]["share"] > 0
        assert 0 < everything["mfu"] < 2


@pytest.mark.slow
def test_memory_is_compared(tmp_path, capsys, monkeypatch):
    one = [bench_memory.Case(TINY, "adapt", True)]
    monkeypatch.setattr(bench_memory, "cases", lambda *arguments: one)
    assert bench_memory.main(["--network", "tiny"]) == 0
    assert "plan/it" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "bench_memory_tiny_cpu.json").read_text())["rows"]
    assert row["planned_over_peak"] == row["planned_bytes"] / row["peak_bytes"]
    assert row["updates"]["flow"]["peak"] == row["peak_bytes"] >= row["updates"]["flow"]["backward"]


def test_a_device_that_is_too_small_is_said(monkeypatch):
    def too_small(*arguments):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(bench_memory, "in_fresh_process", too_small)
    row = bench_memory.row(bench_memory.Case(TINY._replace(device="cuda"), "distill", False))
    assert row["how"] == "out of memory" and row["peak_bytes"] is None
    assert "out of memory" in bench_memory.page([row])


def test_what_is_compared_by_default():
    both = bench_memory.cases(["tiny", "20m"], "cpu", None, [0])
    assert len(both) == len(set(both)) == 16
    large = bench_memory.cases(["0.6b"], "cuda", None, [0, 16])
    assert {(c.stage, c.request.precision, c.request.batch) for c in large} == {
        ("distill", Precision.bf16, 32)
    }
    assert [(c.micro_batch, c.checkpointing) for c in large] == [
        (0, False),
        (0, True),
        (16, False),
        (16, True),
    ]


@pytest.mark.slow
def test_growth_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_growth, "START", bench_growth.Point(tokens=16, batch=2, depth=1))
    monkeypatch.setattr(bench_growth, "AXES", {"tokens": (16, 64)})
    assert bench_growth.main(["--width", "64", "--rounds", "1", "--whole-step"]) == 0
    assert "update, tokens" in capsys.readouterr().out
    record = json.loads((tmp_path / "bench_growth_cpu.json").read_text())
    for name in ("pass", "update"):
        table = record[name]["tokens"]
        assert table["sizes"] == [16, 64] and table["flops"][0] < table["flops"][1]
        assert table["time_exponent"] == pytest.approx(table["time_exponent_of_the_last_two"])


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        (bench_flops, ["--batch", "1"], "at least 2"),
        (bench_flops, ["--device", "cuda"], "no CUDA device"),
        (bench_memory, ["--batch", "1"], "at least 2"),
        (bench_memory, ["--batch", "0"], "at least 2"),
        (bench_memory, ["--micro-batch", "0", "1"], "at least 2"),
        (bench_memory, ["--device", "cuda"], "no CUDA device"),
        (bench_growth, ["--width", "100"], "multiple of 64"),
        (bench_growth, ["--largest", "256"], "at least two"),
    ],
)
def test_wrong_requests_are_one_line(tool, arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tool.main(arguments) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("tool", [bench_flops, bench_memory, bench_growth])
def test_help_gives_an_example(tool, capsys):
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    assert f"python -m {tool.__name__}" in capsys.readouterr().out
