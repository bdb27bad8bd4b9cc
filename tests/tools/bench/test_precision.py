"""The precision benchmark at toy size: its gradient is the stage's, its reference exact, its islands real."""

import math

import pytest
import torch

from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from sprint.train.distill import DistillStage
from sprint.train.draws import draw
from tests.tiny import LATENT, tiny_batch, tiny_network, tiny_null, tiny_recipe
from tests.tolerance import assert_close, central, of_network, rounding
from tools.bench import precision as bench_precision
from tools.bench import precision_cases
from tools.bench.precision import DEFAULT, VARIANTS, gradient_in
from tools.bench.precision_cases import Case, Outcome, TrueFloat64, exact_gradient

FP64 = torch.float64


@pytest.fixture
def case() -> Case:
    return precision_cases.case_of(tiny_recipe(), tiny_network(), tiny_batch(dtype=FP64), tiny_null(FP64), 0)


def difference(a: Outcome, b: Outcome) -> float:
    return bench_precision.errors(a, b)["error"]


# ---- what is differentiated -------------------------------------------------------------------------


def test_the_gradient_is_that_of_stage_two(engine):
    recipe = tiny_recipe()
    stage = DistillStage(recipe, engine, tiny_network(), tiny_null(), LATENT)
    stage.generator_updates = 10**6  # r = 1
    batch, draws = tiny_batch(), draw(recipe, 0, LATENT)
    loss, _ = stage.consistency_term(batch, stage.with_null(batch), draws)
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in stage.student.named_parameters()}
    stage.student.zero_grad()
    same = Case(stage.student, stage.teacher.network, batch, tiny_null(), draws)
    ours = precision_cases.consistency_gradient(same, stage.student, stage.teacher, torch.float32, False)
    assert all(torch.equal(ours.gradient[name], grad.double()) for name, grad in wanted.items())
    assert ours.gradient.keys() == wanted.keys()


def test_float64_is_float64_throughout(case):
    """A central difference of F: with anything in float32 inside, it would be wrong by 1e-3."""
    view = TrigFlowView(tiny_network().double(), DENSE_TIME)
    t, v_t, h = case.draws.t, torch.ones(8, dtype=FP64), 1e-5
    with TrueFloat64(), torch.no_grad():
        F = [view(case.batch.latent, t + s * h, case.batch.text, case.batch.mask) for s in (1, -1)]
        _, tangent = precision_cases.value_and_tangent(
            lambda x, t: view(x, t, case.batch.text, case.batch.mask),
            case.batch.latent,
            t,
            torch.zeros_like(case.batch.latent),
            v_t,
        )
    assert tangent.norm() > 1e-2
    assert ((F[0] - F[1]) / (2 * h) - tangent).norm() < central(h, of_network(view, passes=2)) * F[0].norm()


def test_sinusoids_in_float64_have_their_closed_form():
    t = torch.tensor([0.3, 1.0], dtype=FP64)
    with TrueFloat64():
        features = tiny_network().time_embed.emb.time_proj(t)
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=FP64) / 128)
    assert features.dtype == FP64
    assert_close(features[:, :128], torch.cos(t[:, None] * frequencies), rounding(FP64, steps=10))


def test_random_weights_have_the_gains_asked_for():
    wanted = precision_cases.gains_of(precision_cases.random_network(unit_gains(), 0, 1, 64))
    network = precision_cases.random_network(wanted, 1, 2, 64)
    assert len(network.transformer_blocks) == 2
    for name, gain in precision_cases.gains_of(network).items():
        assert gain == pytest.approx(wanted[name], rel=0.5)
    assert torch.equal(network.transformer_blocks[0].attn1.norm_q.weight, torch.ones(64))


def unit_gains() -> dict[str, float]:
    torch.manual_seed(0)
    names = tiny_network().state_dict()
    return {precision_cases.kind(name): 1.0 for name in names}


# ---- errors -------------------------------------------------------------------------------------------


def outcome_of(**gradient: list[float]) -> Outcome:
    one = torch.ones(3)
    return Outcome(one, one, one, {name: torch.tensor(g, dtype=FP64) for name, g in gradient.items()})


def test_errors_have_known_values():
    names = ["time_embed.w", "0.attn1.w", "0.attn2.w", "0.ff.w", "logvar.w"]
    exact = outcome_of(**{name: [1.0, 0.0] for name in names})
    doubled = outcome_of(**{name: [2.0, 0.0] for name in names})
    turned = outcome_of(**{name: [0.0, 1.0] if "ff" in name else [1.0, 0.0] for name in names})
    twice, one_off = (bench_precision.errors(outcome, exact) for outcome in (doubled, turned))
    assert twice["cosine"] == pytest.approx(1) and twice["error"] == pytest.approx(1)
    assert one_off["cosine"] == pytest.approx(4 / 5) and one_off["error"] == pytest.approx(math.sqrt(2 / 5))
    assert one_off["cosine of convolutions"] == 0 and one_off["cosine of rest"] == pytest.approx(1)
    assert twice["D"] == twice["F_prime"] == twice["g"] == 0


# ---- variants -----------------------------------------------------------------------------------------


def test_every_variant_changes_the_gradient_and_fp32_is_nearest(case, bf16_engine):
    exact = exact_gradient(case)
    outcomes = {name: gradient_in(variant, case, bf16_engine)[0] for name, variant in VARIANTS.items()}
    errors = {name: difference(outcome, exact) for name, outcome in outcomes.items()}
    assert errors["fp32"] < of_network(tiny_network(), passes=4)
    assert all(errors["fp32"] < e < 1 for name, e in errors.items() if name != "fp32")
    for name, outcome in outcomes.items():
        assert name == DEFAULT or difference(outcome, outcomes[DEFAULT]) > 0, f"{name} does nothing"
    assert bench_precision.errors(outcomes["+ teacher (D)"], exact)["D"] < of_network(tiny_network())
    assert not any(p.grad is not None for p in case.student.parameters())  # the case itself is untouched


@pytest.mark.parametrize("frozen", [False, True])
def test_an_island_runs_in_float32_with_the_exact_weights(frozen, bf16_engine):
    exact, network = tiny_network(), tiny_network()
    if frozen:
        bf16_engine.frozen(network)
    bench_precision.CONVOLUTIONS(network, exact)
    seen = {}
    for name in ("attn1", "ff"):
        module = network.transformer_blocks[1].get_submodule(name)
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out.dtype}))
    x_hat, text, mask = tiny_batch(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        TrigFlowView(network, DENSE_TIME)(x_hat, torch.tensor([0.5, 1.0]), text, mask)
    assert seen == {"attn1": torch.bfloat16, "ff": torch.float32}
    ours, theirs = (n.transformer_blocks[1].ff.conv_point.weight for n in (network, exact))
    assert torch.equal(ours, theirs)


def test_the_tables_name_every_variant_and_the_default_takes_its_own_time(case, bf16_engine):
    few = {name: VARIANTS[name] for name in (DEFAULT, "fp32")}
    table = bench_precision.summaries(bench_precision.measure([case, case], bf16_engine, few, 2))
    assert table[DEFAULT]["time"] == {"median": 1, "min": 1, "max": 1}
    page = bench_precision.page("toy", table)
    assert all(f"| {name} |" in page for name in few)
    assert table["fp32"]["cosine"]["min"] > table[DEFAULT]["cosine"]["max"]


# ---- the program --------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--networks", "--batches", "--blocks"])
def test_nothing_to_measure_is_one_line(option, capsys):
    assert bench_precision.main([option, "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_help_gives_an_example(capsys):
    with pytest.raises(SystemExit) as exit:
        bench_precision.main(["--help"])
    assert exit.value.code == 0 and "python -m tools.bench.precision" in capsys.readouterr().out
