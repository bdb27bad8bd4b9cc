"""The benchmarks at toy size: what they measure is right, and the two steps they compare are one algorithm."""

import json
import math
import os
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import torch
from accelerate.state import AcceleratorState

from sprint.engine.optim import start_state
from sprint.models.discriminator import BatchNormLocal
from sprint.recipe.schema import Optimizer, Precision
from sprint.train import distill
from sprint.train.distill import DistillStage
from sprint.train.draws import Draws, draw
from tests.tiny import LATENT, tiny_batch, tiny_network, tiny_null, tiny_recipe
from tests.tolerance import assert_all_close, near, of_network, readings, rounding
from tools.bench import jvp as bench_jvp
from tools.bench import measure, plain_step
from tools.bench import step as bench_step
from tools.bench.variants import PLAIN

G, D = 0, 1  # steps of each phase
MB = 1_000_000


# ---- measure ----------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_the_warm_up_is_not_counted():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ABC"}
    seconds = measure.interleaved(functions, repeats=3, warmup=2)
    assert calls == list("ABC") * 5
    assert {name: len(values) for name, values in seconds.items()} == {"A": 3, "B": 3, "C": 3}
    assert all(value >= 0 for values in seconds.values() for value in values)


def test_ratios_are_taken_round_by_round():
    """A machine that slows to a tenth in one round leaves the ratio as it is."""
    a, b = [3.0, 30.0, 3.6], [2.0, 20.0, 2.0]
    assert measure.ratio(a, b) == pytest.approx({"median": 1.5, "min": 1.5, "max": 1.8})
    assert measure.summary(a) == {"median": 3.6, "min": 3.0, "max": 30.0}
    with pytest.raises(ValueError):
        measure.ratio(a, b[:2])


def two_peaks() -> list[int]:
    """Of 200 MB, then of twice 40 MB one after the other."""

    def small() -> None:
        for _ in range(2):
            torch.ones(10 * MB)

    return [measure.peak_memory(lambda: torch.ones(50 * MB)), measure.peak_memory(small)]


def test_peak_memory_of_known_sizes():
    first, second = measure.in_fresh_process(two_peaks)
    assert first == pytest.approx(200 * MB, rel=0.03)
    assert second == pytest.approx(40 * MB, rel=0.05)


def test_a_fresh_process_is_another_one_and_its_errors_are_told():
    name = next(iter(measure.RETURN_AT_ONCE))
    assert name not in os.environ
    assert measure.in_fresh_process(os.getenv, name) == measure.RETURN_AT_ONCE[name]
    assert measure.in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="math domain"):
        measure.in_fresh_process(math.log, 0)
    assert name not in os.environ


def test_results_hold_the_environment_and_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("tools.bench.step", None))
    monkeypatch.setattr(sys, "argv", ["step.py", "--rounds", "5"])
    file = measure.write_results("name", {"figure": 1.5})
    text = file.read_text()
    record = json.loads(text)
    assert file == tmp_path / "results" / "name.json" and record["figure"] == 1.5
    environment = record["environment"]
    assert environment.keys() == {"device", "cpu", "threads", "versions", "commit", "command"}
    assert environment["versions"].keys() == {"python", "torch", "diffusers"}
    assert environment["command"] == "python -m tools.bench.step --rounds 5"
    assert str(measure.ROOT) not in text
    with pytest.raises(ValueError):
        measure.write_results("name", {"figure": math.nan})


def test_the_benchmark_networks():
    with torch.device("meta"):
        sizes = {name: size.teacher("meta") for name, size in measure.SIZES.items()}
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in sizes.items()}
    assert counts["20m"] == pytest.approx(20e6, rel=0.05)
    assert counts["0.6b"] == 591_876_896
    size = measure.SIZES["20m"]
    network, text = sizes["20m"], size.text(2, "meta")[0]
    assert (len(network.transformer_blocks), network.patch_embed.proj.out_channels) == (12, 320)
    assert size.latent == (32, 16, 16) and text.shape == (2, 300, 2304)


# ---- the plain step is the same algorithm -------------------------------------------------------------


def make_pair(engine, dtype=torch.float32, adversarial=0.5, neighbours=4, **changes) -> tuple:
    """Both steps with equal weights, and no clipping, so that gradients can be compared afterwards."""
    recipe = tiny_recipe()
    recipe.distill.adversarial.weight = adversarial
    recipe.distill.adversarial.neighbours = neighbours
    recipe.distill.optimizer = recipe.distill.adversarial.optimizer = Optimizer(clip_norm=1e9)
    for key, value in changes.items():
        setattr(recipe, key, value)
    ours = DistillStage(recipe, engine, tiny_network().to(dtype), tiny_null(dtype), LATENT)
    plain = plain_step.PlainStep(recipe, engine, tiny_network().to(dtype), tiny_null(dtype))
    plain.student.load_state_dict(ours.student.state_dict())
    plain.student.to(dtype), ours.student.to(dtype)
    renew_state(ours.generator)
    if adversarial:
        plain.heads.load_state_dict(ours.heads.state_dict())
        plain.heads.to(dtype), ours.heads.to(dtype)
        renew_state(ours.discriminator)
    return ours, plain


def renew_state(updater) -> None:
    """The optimizer's state in the dtype that the weights have now."""
    updater.trained.optimizer.state.clear()
    start_state(updater.trained.optimizer)


def update_of(stage) -> float:
    """Rounding of one update: student or heads behind the teacher, forward, tangent, and backward twice."""
    return of_network(stage.student, stage.teacher, passes=4)


def compare(engine, ours, plain, step: int, part: str, dtype=torch.float32) -> dict:
    """One update of each on the same batch: losses and every gradient agree.  -> ours' losses"""
    batch = tiny_batch(seed=step, dtype=dtype)
    seen, expected = ours.update(step, batch).read(engine), plain.update(step, batch)
    both = expected.keys() & seen.keys()
    # what is read has passed through float32, whatever it was computed in
    read = update_of(ours) + rounding(torch.float32)
    assert {name: seen[name] for name in both} == readings(
        {name: expected[name].item() for name in both}, read
    )
    gradients, theirs = (
        {name: p.grad for name, p in getattr(stage, part).named_parameters()} for stage in (ours, plain)
    )
    assert max(grad.abs().max() for grad in gradients.values()) > 0
    assert_all_close(gradients, {name: theirs[name] for name in gradients}, update_of(ours))
    return seen


@pytest.fixture
def single_samples(monkeypatch):
    """Every sample is its own batch-norm group: who stands beside whom no longer matters."""
    for norm in (BatchNormLocal, plain_step.LocalBatchNorm):

        def alone(self, x, virtual_batch, forward=norm.forward):
            return forward(self, x, 1)

        monkeypatch.setattr(norm, "forward", alone)


@pytest.fixture
def draws_in_float64(true_float64, monkeypatch):
    def double(recipe, step, latent_shape):
        return Draws(*(tensor.double() for tensor in draw(recipe, step, latent_shape)))

    for module in (distill, plain_step):
        monkeypatch.setattr(module, "draw", double)


def test_the_consistency_loss_and_its_gradient_are_the_same(engine):
    ours, plain = make_pair(engine, adversarial=0.0)
    ours.generator_updates = plain.generator_updates = 2  # half warmed up: the tangent counts
    assert compare(engine, ours, plain, G, "student")["loss_scm"] != 0


def test_the_discriminators_loss_and_its_gradient_are_the_same(engine, draws_in_float64):
    """In float64: in float32 an activation of the heads may be so near its corner that rounding turns it over."""
    ours, plain = make_pair(engine, torch.float64)
    assert compare(engine, ours, plain, D, "heads", torch.float64)["loss"] > 0


def test_the_whole_generator_is_the_same_where_no_sample_sees_another(
    engine, draws_in_float64, single_samples
):
    ours, plain = make_pair(engine, torch.float64)
    compare(engine, ours, plain, G, "student", torch.float64)


def test_in_the_generators_phase_the_published_heads_see_fakes_alone(engine):
    """The one difference between the two: which samples share batch-norm statistics."""
    ours, plain = make_pair(engine)
    batch = tiny_batch()
    seen, expected = ours.update(G, batch).read(engine), plain.update(G, batch)
    assert seen["loss_scm"] == near(
        expected["loss_scm"].item(), update_of(ours), scale=max(1, abs(expected["loss_scm"].item()))
    )
    assert abs(seen["loss_adv"] - expected["loss_adv"].item()) > 1e-3


def test_the_generator_agrees_to_the_last_digits_in_float64(engine, draws_in_float64, single_samples):
    ours, plain = make_pair(engine, torch.float64)
    ours.generator_updates = plain.generator_updates = 2
    compare(engine, ours, plain, G, "student", torch.float64)


@pytest.mark.parametrize("neighbours", [2, 3, 8])
def test_the_discriminator_agrees_to_the_last_digits_in_float64(engine, draws_in_float64, neighbours):
    """Groups and misaligned pairs are the same, with a smaller last group as well."""
    ours, plain = make_pair(engine, torch.float64, neighbours=neighbours)
    compare(engine, ours, plain, D, "heads", torch.float64)


def test_checkpointing_and_bf16_leave_every_weight_of_the_plain_student_its_gradient(bf16_engine):
    """Autocast keeps its copies of the weights; those of the pass without gradients must not serve the other."""
    _, plain = make_pair(bf16_engine, activation_checkpointing=True)
    torch.nn.init.normal_(plain.student.network.time_embed.guidance_embedder.linear_2.weight)
    loss = plain.update(G, tiny_batch())["loss"]
    assert torch.isfinite(loss)
    assert all(p.grad is not None and p.grad.norm() > 0 for p in plain.student.parameters())
    assert all(p.grad is None for p in plain.heads.parameters())


def test_two_passes_on_a_function_known_by_heart():
    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.constant_(layer.weight, 3.0)
    x, t, v_x, v_t = torch.tensor([[2.0], [0.5], [0.7], [-0.2]], dtype=torch.float64)
    value, tangent = plain_step.value_and_tangent_in_two_passes(
        lambda x, t: layer(x) * torch.sin(t), x, t, v_x, v_t
    )
    few = rounding(torch.float64, steps=8)
    assert value.item() == near(6 * math.sin(0.5), few)
    assert tangent.item() == near(3 * 0.7 * math.sin(0.5) - 6 * 0.2 * math.cos(0.5), few, scale=1)
    assert not tangent.requires_grad
    value.backward()
    assert layer.weight.grad.item() == near(2 * math.sin(0.5), few)


# ---- the benchmarks, end to end -----------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Where results go; accelerate forgets its device and precision before and after."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)


TOY = ["--network", "tiny", "--batch", "2", "--rounds", "1"]


def without_fresh_processes(function, *arguments):
    """Memory in this very process: its figures mean nothing here, except that they are above zero."""
    answer = function(*arguments)
    return {name: 1 + value for name, value in answer.items()} if isinstance(answer, dict) else 1 + answer


def one_block() -> measure.Size:
    tiny = measure.SIZES["tiny"]
    return replace(tiny, config=tiny.config | {"num_layers": 1}, taps=(0,))


def peaks_of_one_block() -> dict[str, int]:
    measure.SIZES["one block"] = one_block()
    return bench_step.memory_of(PLAIN, measure.Request("one block", 2, "cpu", Precision.fp32), False)


def test_the_steps_memory_is_that_of_a_process_of_its_own():
    peaks = measure.in_fresh_process(peaks_of_one_block)
    weights = sum(p.numel() for p in one_block().teacher("meta").parameters())
    assert peaks["everything"] > 4 * 3 * weights  # teacher, student and the student's gradients
    assert peaks["everything"] > peaks["G"] > peaks["D"] > 0


@pytest.mark.slow
def test_the_step_is_measured(results, capsys, monkeypatch):
    monkeypatch.setattr(bench_step, "in_fresh_process", without_fresh_processes)
    monkeypatch.setattr(bench_step, "keep_freed_memory", lambda: None)
    assert bench_step.main(TOY) == 0
    said = capsys.readouterr().out
    assert "speed, ours over plain" in said and "bench_step_tiny_cpu.json" in said
    record = json.loads((results / "bench_step_tiny_cpu.json").read_text())
    assert (record["network"], record["batch"], record["rounds"]) == ("tiny", 2, 1)
    for seconds in record["seconds"].values():
        assert seconds["G+D"]["min"] >= seconds["G"]["min"] + seconds["D"]["min"]
    ours = {name for name in record["seconds"] if name.startswith("ours")}
    assert "ours" in ours and "plain" in record["seconds"]
    assert record["speed_ratio"].keys() == record["memory_ratio"].keys() == ours
    for rivals in record["speed_ratio"].values():
        assert "plain" in rivals
        for ratios in rivals.values():
            assert 0 < ratios["G+D"]["min"] <= ratios["G+D"]["median"] <= ratios["G+D"]["max"]
    assert record["goal"] == {"speed": 3.5, "stretch": None, "memory": None}


@pytest.mark.slow
def test_value_and_tangent_are_measured(results, capsys, monkeypatch):
    monkeypatch.setattr(bench_jvp, "in_fresh_process", without_fresh_processes)
    monkeypatch.setattr(bench_jvp, "keep_freed_memory", lambda: None)
    assert bench_jvp.main(TOY) == 0
    assert "ours / plain" in capsys.readouterr().out
    record = json.loads((results / "bench_jvp_tiny_cpu.json").read_text())
    assert list(record["seconds"]) == list(bench_jvp.EAGER)
    assert record["time_ratio"].keys() == {"ours / plain", "ours, as trained / plain", "two passes / plain"}
    assert all(value["min"] > 0 for value in record["time_ratio"].values())


@pytest.mark.parametrize("tool", [bench_jvp, bench_step])
def test_wrong_requests_are_one_line(tool, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in ((["--device", "cuda"], "no CUDA device"), (["--rounds", "0"], "at least 1")):
        assert tool.main([*TOY, *arguments]) == 2
        said = capsys.readouterr()
        assert words in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("tool", [bench_jvp, bench_step])
def test_help_gives_an_example(tool, capsys):
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    assert f"python -m {tool.__name__}" in capsys.readouterr().out
