"""Who is measured against whom: variants by what multiplies, diffusers' forwards with our products, and wrong paths."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import linear

from sprint.base.names import BUILT_IN
from sprint.base.products import Product, bf16_linear, onednn_linear
from sprint.models.student import Student, from_adapted
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Precision, Products
from sprint.train.distill import DistillStage
from tests.tiny import LATENT, tiny_batch, tiny_network, tiny_null, tiny_recipe
from tests.tolerance import assert_close, of_network, rounding
from tools.bench import compiling as bench_compiling
from tools.bench import measure, plain_step, variants
from tools.bench import network as bench_network
from tools.bench import step as bench_step
from tools.bench.network import Outcome, distance, is_wrong
from tools.bench.variants import COMPILED, FASTEST, OURS, PLAIN, change_products_alone

TINY = measure.Request("tiny", 2, "cpu", Precision.fp32)
TOY = ["--network", "tiny", "--batch", "2", "--rounds", "1"]


@pytest.fixture(autouse=True)
def on_cpu(tmp_path, monkeypatch):
    """accelerate forgets device and precision before and after; results go elsewhere."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def processor(monkeypatch, exact, fastest) -> None:
    """One on which these are the best products in float32 and of all."""
    monkeypatch.setattr(variants, "float32_products", lambda: exact)
    monkeypatch.setattr(variants, "fastest_products", lambda: fastest)


def names(found) -> list[str]:
    return [each.name for each in found]


# ---- who is there -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exact", "fastest", "plain", "ours"),
    [
        (linear, linear, ["plain"], ["ours"]),
        (onednn_linear, onednn_linear, ["plain", "plain, same fp32 products"], ["ours"]),
        (linear, bf16_linear, ["plain", "plain, same products"], ["ours", "ours, fastest"]),
        (
            onednn_linear,
            bf16_linear,
            ["plain", "plain, same fp32 products", "plain, same products"],
            ["ours", "ours, fastest"],
        ),
    ],
)
def test_variants_that_multiply_alike_are_one(monkeypatch, exact, fastest, plain, ours):
    processor(monkeypatch, exact, fastest)
    assert names(variants.variants_of("cpu", compiled=False)) == plain + ours
    assert names(variants.variants_of("cpu", compiled=True)) == [*plain, *ours, "ours, compiled"]
    assert names(variants.variants_of("cuda", compiled=True)) == ["plain", "ours", "ours, compiled"]


def test_each_of_ours_is_held_against_plain_and_against_what_multiplies_as_it_does(monkeypatch):
    processor(monkeypatch, onednn_linear, bf16_linear)
    among = variants.variants_of("cpu", compiled=True)
    rivals = {each.name: names(variants.rivals_of(each, among, "cpu")) for each in among if each.ours}
    assert rivals == {
        "ours": ["plain", "plain, same fp32 products"],
        "ours, fastest": ["plain", "plain, same products"],
        "ours, compiled": ["plain", "plain, same products"],
    }
    processor(monkeypatch, linear, bf16_linear)
    among = variants.variants_of("cpu", compiled=False)
    assert names(variants.rivals_of(OURS, among, "cpu")) == ["plain"]
    assert names(variants.rivals_of(OURS, among, "cuda")) == ["plain"]


def test_what_each_variant_does_to_a_network(monkeypatch):
    """Ours goes by the engine; plain stays as it is; same products change the products of its blocks alone."""
    processor(monkeypatch, linear, bf16_linear)
    same = next(each for each in variants.ALL if each.name == "plain, same products")
    found = {}
    for variant in (PLAIN, same, OURS, FASTEST):
        AcceleratorState._reset_state(reset_partial_state=True)
        network = tiny_network()
        variant.hasten(variant.engine(TINY), network)
        block = network.transformer_blocks[0]
        replaced = [name for name, part in network.named_modules() if "forward" in part.__dict__]
        found[variant.name] = (type(block.attn1.processor).__name__, bool(replaced))
        assert variant is not same or all(name.startswith("transformer_blocks") for name in replaced)
    theirs = "SanaLinearAttnProcessor2_0"
    assert found == {
        "plain": (theirs, False),
        "plain, same products": (theirs, True),
        "ours": ("LinearAttention", True),
        "ours, fastest": ("LinearAttention", True),
    }


# ---- diffusers' forwards with our products --------------------------------------------------------------


def value_of(network) -> torch.Tensor:
    batch = tiny_batch()
    with torch.no_grad():
        (value,) = network(
            batch.latent,
            batch.text,
            torch.linspace(0.1, 0.9, 8),
            encoder_attention_mask=batch.mask,
            return_dict=False,
        )
    return value


def test_products_in_float32_leave_values_as_they_are():
    exact, same = tiny_network(), tiny_network()
    change_products_alone(same, lambda x, weight, bias=None: torch.nn.functional.linear(x, weight, bias))
    assert any(isinstance(part.__dict__.get("forward"), Product) for part in same.modules())
    assert_close(value_of(same), value_of(exact), of_network(exact))


def test_every_product_of_a_block_takes_bf16_factors_and_no_other():
    exact, same = tiny_network(), tiny_network()
    change_products_alone(same, bf16_linear)
    for name, part in same.named_modules():
        product = isinstance(part, nn.Linear) or (
            isinstance(part, nn.Conv2d) and part.groups == 1 and part.kernel_size == (1, 1)
        )
        forward = part.__dict__.get("forward")
        low = isinstance(forward, variants.Bf16Convolution) or (
            isinstance(forward, Product) and forward.multiply is bf16_linear
        )
        assert low == (product and name.startswith("transformer_blocks")), name
    error = (value_of(same) - value_of(exact)).norm() / value_of(exact).norm()
    assert 0 < error < of_network(exact) * torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_bf16_factors(bias):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 5, 1, bias=bias), torch.randn(2, 6, 3, 4)
    low = variants.Bf16Convolution(layer)(x)
    rows = bf16_linear(x.permute(0, 2, 3, 1), layer.weight.flatten(1), layer.bias).permute(0, 3, 1, 2)
    assert low.dtype == torch.float32 and low.shape == (2, 5, 3, 4)
    assert_close(low, rows, rounding(torch.bfloat16, terms=6))


def test_the_plain_step_takes_the_products_it_is_given(engine):
    seen = []
    step = plain_step.PlainStep(
        tiny_recipe(), engine, tiny_network(), tiny_null(), hasten=lambda module: seen.append(module)
    )
    assert seen == [step.teacher.network, step.student]
    assert "hasten" not in vars(engine)  # which is as it was
    untouched = plain_step.PlainStep(tiny_recipe(), engine, tiny_network(), tiny_null())
    for network in (untouched.student, untouched.teacher):
        assert not any("forward" in part.__dict__ for part in network.modules())


def test_ours_takes_the_products_it_is_measured_with(monkeypatch):
    processor(monkeypatch, linear, bf16_linear)
    monkeypatch.setattr("sprint.engine.engine.fastest_products", lambda: bf16_linear)
    stage = DistillStage(tiny_recipe(), FASTEST.engine(TINY), tiny_network(), tiny_null(), LATENT)
    product = stage.student.network.transformer_blocks[0].attn1.to_q.forward
    assert product.multiply is bf16_linear
    assert FASTEST.products is COMPILED.products is Products.fastest and OURS.products is Products.exact


# ---- the step's page ------------------------------------------------------------------------------------


def ratios(speed: float) -> dict:
    return {phase: {"median": speed, "min": speed, "max": speed} for phase in ("G", "D", "G+D")}


def test_the_page_says_what_falls_short_and_of_whom():
    goal = bench_step.Goal(2.0, stretch=3.0, memory=0.6)
    found = {"ours, fastest": {"plain": ratios(2.4), "plain, same products": ratios(1.9)}}
    over_plain, over_same = bench_step.speed_lines(found, goal)
    assert over_plain.startswith("speed, ours, fastest over plain: 2.40") and "short" not in over_plain
    assert "over plain, same products: 1.90" in over_same and over_same.endswith(": falls short")
    memory = {"memory_ratio": {"ours": {"everything": 0.61, "G": 0.5, "D": 0.9}}}
    assert bench_step.memory_lines(memory, goal)[0].endswith("wanted at most 0.6: falls short")
    assert "wanted" not in bench_step.memory_lines(memory, None)[0]


def test_the_built_in_family_is_measured_as_its_recipe_runs_it():
    size, recipe = measure.SIZES["tiny"], load_recipe("tiny")
    assert (size.batch, size.text_tokens) == (recipe.distill.batch_size, recipe.text.max_length)
    assert size.taps == tuple(recipe.distill.adversarial.taps)
    weights = load_file(BUILT_IN["tiny"] / "transformer" / "diffusion_pytorch_model.safetensors")
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    ours = {name: tuple(p.shape) for name, p in size.teacher("meta").state_dict().items()}
    assert theirs.items() <= ours.items()
    assert all("norm_" in name for name in ours.keys() - theirs.keys())  # QK-norm: the teacher is adapted


# ---- values and gradients -------------------------------------------------------------------------------


def outcome(value: float, *gradient: float) -> Outcome:
    return Outcome(torch.tensor([value]), [torch.tensor([each]) for each in gradient])


def test_distances_of_known_outcomes():
    apart = distance(outcome(1.1, 3.0, 4.5), outcome(1.0, 3.0, 4.0))
    assert apart == {"value": pytest.approx(0.1, rel=1e-5), "gradient": pytest.approx(0.5 / 5)}


@pytest.mark.parametrize(
    ("ours", "rival", "wrong"),
    [
        (1e-6, 0.0, False),  # rounding
        (1e-4, 0.0, True),
        (2e-3, 1.1e-3, False),  # as bf16 rounds
        (4e-3, 1.1e-3, True),
        (float("nan"), 1.1e-3, True),
    ],
)
def test_a_path_is_wrong_beyond_what_its_products_round(ours, rival, wrong):
    for part in ("value", "gradient"):
        close = {"value": 0.0, "gradient": 0.0}
        assert is_wrong(close | {part: ours}, close | {part: rival}, Precision.fp32) == wrong


def test_ours_gives_diffusers_values_and_gradients():
    plain, ours = (bench_network.pass_of(variant, TINY)() for variant in (PLAIN, OURS))
    apart = distance(ours, plain)
    student = Student(from_adapted(measure.SIZES["tiny"].teacher()))
    assert apart["value"] < of_network(student) and apart["gradient"] < of_network(student, passes=3)


@pytest.mark.slow
def test_the_network_is_measured_and_a_wrong_path_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_network, "keep_freed_memory", lambda: None)
    processor(monkeypatch, linear, linear)
    assert bench_network.main(TOY) == 0
    assert "speed, ours over plain" in capsys.readouterr().out
    record = json.loads((tmp_path / "bench_network_tiny_cpu.json").read_text())
    assert record["wrong"] == [] and record["seconds"].keys() == {"plain", "ours"}
    assert record["distance_from_plain"]["plain"] == {"value": 0, "gradient": 0}
    monkeypatch.setattr("sprint.models.sana.layout.EPS", 1.0)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert bench_network.main(TOY) == 1
    assert "WRONG" in capsys.readouterr().out


# ---- compiling ------------------------------------------------------------------------------------------


def test_starts_share_one_folder_of_graphs_and_leave_nothing(tmp_path, monkeypatch, capsys):
    folders, firsts = [], iter([1.0, 101.0, 11.0])

    def process(function, variant, request, rounds, variables):
        (folder,) = map(measure.Path, variables.values())
        assert [*variables] == ["TORCHINDUCTOR_CACHE_DIR"] and folder.is_dir()
        folders.append(folder)
        (folder / f"graph-{len(folders)}").write_bytes(b"0" * 1000)
        first = next(firsts)
        return {"build": 0.5, "first_pair": first, "later_pair": 1.0, "compiling": first - 1.0}

    monkeypatch.setattr(bench_compiling, "in_fresh_process", process)
    assert bench_compiling.main(TOY) == 0
    assert "wanted: compiling at most 60 s in a fresh folder: falls short" in capsys.readouterr().out
    record = json.loads((tmp_path / "bench_compiling_tiny_cpu.json").read_text())
    assert [*record["seconds"]] == ["eager", "fresh folder", "kept folder"]
    assert record["folder_bytes"] == {"eager": 1000, "fresh folder": 2000, "kept folder": 3000}
    assert record["seconds"]["kept folder"]["compiling"] == 10.0
    assert len(set(folders)) == 1 and not folders[0].exists()


def test_a_start_is_timed_by_its_parts(monkeypatch):
    calls = []
    monkeypatch.setattr(bench_compiling, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(bench_compiling, "update_of", lambda *arguments, **options: calls.append)
    found = bench_compiling.start_of(OURS, TINY, rounds=2)
    assert calls == [0, 1] * 4  # the first, one that is not counted, two that are
    assert found["compiling"] == found["first_pair"] - found["later_pair"]


@pytest.mark.parametrize("tool", [bench_network, bench_compiling])
def test_wrong_requests_are_one_line(tool, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in ((["--device", "cuda"], "no CUDA device"), (["--rounds", "0"], "at least 1")):
        assert tool.main([*TOY, *arguments]) == 2
        said = capsys.readouterr()
        assert words in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("tool", [bench_network, bench_compiling])
def test_help_gives_an_example(tool, capsys):
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    assert f"python -m {tool.__name__}" in capsys.readouterr().out
