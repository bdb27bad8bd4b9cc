"""What bf16 costs the sCM gradient, and what fp32 islands in it give back, against fp64.

    python -m tools.bench.precision                # 28 blocks, 3 networks; built-in network, 16 batches
    python -m tools.bench.precision --networks 1 --batches 2

    random     28 blocks, 256 wide, 256 tokens, batch 4. Random weights, scaled kind by kind as the built-in network's
    built-in   the built-in teacher, calibrated: 4 blocks, 128 wide, trained weights, scenes in batches of 8

Both at the start of stage 2, where the student is the adapted teacher, but with the tangent warmed up (r = 1). Each
variant meets the same weights, noise and times (drawn in float64, by the recipe's densities) and gives the gradient
of L_sCM over all parameters as one vector. "1 − cos" and "error" compare it with fp64's; D, F' and the normalised g
have their own relative errors; "time" is processor time over the default's. Medians over networks or batches, and the
worst. CPU arithmetic: bf16 products, float32 sums. Writes tools/results/bench_precision-cpu.json.
"""

import argparse
import copy
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType

import torch
from diffusers import SanaTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from tqdm import tqdm

from sprint.base.errors import SprintError
from sprint.base.products import use_products
from sprint.engine.engine import Engine, keep_time_in_float32
from sprint.maths.dual import Dual
from sprint.maths.trigflow import flow_time, to_flow_input, to_trig_velocity
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from sprint.recipe.schema import Precision
from tools.bench.measure import summary, write_results
from tools.bench.precision_cases import (
    Case,
    Outcome,
    built_in,
    built_in_cases,
    consistency_gradient,
    exact_gradient,
    gains_of,
    random_cases,
)

WANTED = 0.999  # cosine of the default, at worst
DEFAULT = "bf16, the default"
GROUPS = {  # parameters by what their names hold; the first that fits
    "time": "time_embed.",
    "self-attention": ".attn1.",
    "cross-attention": ".attn2.",
    "convolutions": ".ff.",
    "rest": "",
}


# ---- precisions -------------------------------------------------------------------------------------

Island = Callable[[SanaTransformer2DModel, SanaTransformer2DModel], None]  # of a network, from its exact twin


@dataclass(frozen=True)
class Variant:
    """How the two networks depart from the engine's bf16, or (autocast off) from plain fp32.

    student, teacher   what is changed of each, after the engine has made them ready
    rounded_time       t goes through bf16 before sin and cos
    exact_teacher      the teacher in fp32, and so D
    exact_tangent      F' from another forward, in fp32
    """

    autocast: bool = True
    student: tuple[Island, ...] = ()
    teacher: tuple[Island, ...] = ()
    rounded_time: bool = False
    exact_teacher: bool = False
    exact_tangent: bool = False


def both(*islands: Island) -> Variant:
    return Variant(student=islands, teacher=islands)


def in_float32(*patterns: str) -> Island:
    """Modules whose names match run in fp32: weights, inputs and arithmetic."""

    def make(network: SanaTransformer2DModel, exact: SanaTransformer2DModel) -> None:
        for name, module in network.named_modules():
            if any(re.fullmatch(pattern, name) for pattern in patterns):
                module.float().load_state_dict(exact.get_submodule(name).state_dict())
                _shield(module, autocast=False)

    return make


def linear_attention_in_float32(network: SanaTransformer2DModel, exact: SanaTransformer2DModel) -> None:
    """The products of q, k, v and the division; the projections stay in bf16."""
    for block in network.transformer_blocks:
        attention = block.attn1
        for projection in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
            _shield(projection, autocast=True)
        _shield(attention, autocast=False, cast=False)


def _shield(module: nn.Module, autocast: bool, cast: bool = True) -> None:
    """Run the module's forward with autocast on or off; off, its floating inputs are cast to float32 (if `cast`)."""
    forward = module.forward

    def up(x):
        floating = isinstance(x, (Tensor, Dual)) and x.is_floating_point()
        return x.float() if floating and cast and not autocast else x

    def shielded(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return forward(*map(up, args), **{name: up(x) for name, x in kwargs.items()})

    module.forward = shielded


def stored_in_float32(network: SanaTransformer2DModel, exact: SanaTransformer2DModel) -> None:
    """Vectors and tables (norms, biases, modulation) of a frozen network, as the student's are."""
    for name, p in network.named_parameters():
        if p.ndim == 1 or name.endswith("scale_shift_table"):
            p.data = exact.get_parameter(name).detach().clone()


def stream_in_bf16(network: SanaTransformer2DModel, exact: SanaTransformer2DModel) -> None:
    """The residual stream rounded after every block; fp32 modulation else promotes it to fp32."""
    for block in network.transformer_blocks:
        block.register_forward_hook(lambda module, args, out: out.to(torch.bfloat16))


def time_in_bf16(network: SanaTransformer2DModel, exact: SanaTransformer2DModel) -> None:
    """Undo the engine's shield: the time embedder goes the way of all other layers."""
    del network.time_embed.forward
    network.time_embed.to(network.proj_out.weight.dtype)


def _forward_of_rounded_time(view: TrigFlowView, x_hat, t, text, mask, guidance=None):
    """`TrigFlowView.forward` with sin t, cos t and t_fm in bf16."""
    t_fm = flow_time(t.to(torch.bfloat16)).float()
    x_fm = to_flow_input(x_hat, t_fm)
    return to_trig_velocity(view.flow_velocity(x_fm, t_fm, text, mask, guidance), x_fm, t_fm)


NORMS = in_float32(r".*\.norm\d?(_q|_k)?", "norm_out")
ENDS = in_float32("patch_embed", "caption_projection", "caption_norm", "proj_out")
CONVOLUTIONS = in_float32(r".*\.ff")
ATTENTION = in_float32(r".*\.attn[12]")
CHEAP = (linear_attention_in_float32, NORMS, ENDS)
VARIANTS = {
    DEFAULT: Variant(),
    "fp32": Variant(autocast=False, exact_teacher=True),
    "− time embedder in bf16": both(time_in_bf16),
    "− and t in bf16 before sin, cos": Variant(
        student=(time_in_bf16,), teacher=(time_in_bf16,), rounded_time=True
    ),
    "− residual stream in bf16": both(stream_in_bf16),
    "+ linear attention": both(linear_attention_in_float32),
    "+ norms, modulation": Variant(student=(NORMS,), teacher=(stored_in_float32, NORMS)),
    "+ first and last layers": both(ENDS),
    "+ these three": Variant(student=CHEAP, teacher=(stored_in_float32, *CHEAP)),
    "+ attention with projections": both(ATTENTION),
    "+ convolutions": both(CONVOLUTIONS),
    "+ tangent": Variant(exact_tangent=True),
    "+ teacher (D)": Variant(exact_teacher=True),
}


def gradient_in(variant: Variant, case: Case, engine: Engine) -> tuple[Outcome, float]:
    """The variant's outcome and what it took, in seconds of processor time (others' work does not count)."""
    student, teacher = (use_products(copy.deepcopy(network)) for network in (case.student, case.teacher))
    if variant.autocast:
        keep_time_in_float32(student.to(engine.device))
        for island in variant.student:
            island(student.network, case.student.network)
    if not variant.exact_teacher:
        teacher = engine.frozen(teacher)
        for island in variant.teacher:
            island(teacher, case.teacher)
    view = TrigFlowView(teacher, DENSE_TIME)
    if variant.exact_teacher:
        _shield(view, autocast=False)
    if variant.rounded_time:
        for each in (view, student.view):
            each.forward = MethodType(_forward_of_rounded_time, each)
    tangent_of = use_products(copy.deepcopy(case.student)) if variant.exact_tangent else None
    began = time.process_time()
    outcome = consistency_gradient(case, student, view, torch.float32, variant.autocast, tangent_of)
    return outcome, time.process_time() - began


# ---- measuring --------------------------------------------------------------------------------------


def errors(outcome: Outcome, exact: Outcome) -> dict[str, float]:
    """Cosine and relative error of the gradient, the cosine of each group of it, and errors of D, F', g."""
    result = {"error": _error(_flat(outcome), _flat(exact))}
    result["cosine"] = _cosine(_flat(outcome), _flat(exact))
    result |= {name: _error(getattr(outcome, name), getattr(exact, name)) for name in ("D", "F_prime", "g")}
    for group in GROUPS:
        result[f"cosine of {group}"] = _cosine(_flat(outcome, group), _flat(exact, group))
    return result


def _flat(outcome: Outcome, group: str | None = None) -> Tensor:
    parts = [grad.flatten() for name, grad in outcome.gradient.items() if group in (None, group_of(name))]
    return torch.cat(parts)


def group_of(name: str) -> str:
    return next(group for group, part in GROUPS.items() if part in name)


def _cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def _error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def measure(
    cases: Iterable[Case], engine: Engine, variants: dict[str, Variant], count: int
) -> dict[str, list]:
    """One row of errors and seconds by variant and case; seconds are relative to the first variant's."""
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tqdm(total=count * (len(variants) + 1)) as bar:
        for case in cases:
            exact = exact_gradient(case)
            bar.update()
            gradient_in(next(iter(variants.values())), case, engine)  # first calls are slow
            for name, variant in variants.items():
                outcome, seconds = gradient_in(variant, case, engine)
                rows[name].append(errors(outcome, exact) | {"seconds": seconds})
                bar.update()
    return dict(rows)


def summaries(rows: dict[str, list[dict[str, float]]]) -> dict[str, dict]:
    """By variant: median, least and greatest of each column; time is that of the default's on the same case."""
    result = {}
    for name, cases in rows.items():
        columns = {key: [case[key] for case in cases] for key in cases[0]}
        seconds, default = columns["seconds"], [case["seconds"] for case in rows[DEFAULT]]
        columns["time"] = [a / b for a, b in zip(seconds, default, strict=True)]
        result[name] = {key: summary(values) for key, values in columns.items()}
    return result


# ---- the page ---------------------------------------------------------------------------------------


def page(title: str, table: dict[str, dict]) -> str:
    """A Markdown table."""
    lines = [
        f"{title}",
        "",
        "| | 1 − cos, median | worst | error | worst group | D | F' | g | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in table.items():
        median = {key: values["median"] for key, values in row.items()}
        group = min(GROUPS, key=lambda group: row[f"cosine of {group}"]["min"])
        worst = 1 - row[f"cosine of {group}"]["min"]
        lines.append(
            f"| {name} | {1 - median['cosine']:.1e} | {1 - row['cosine']['min']:.1e} | {median['error']:.2%} "
            f"| {group} {worst:.0e} | {median['D']:.2%} | {median['F_prime']:.2%} | {median['g']:.2%} "
            f"| {median['time']:.2f} |"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--networks", type=int, default=3, help="random networks of 28 blocks (default 3)")
    result.add_argument(
        "--batches", type=int, default=16, help="batches of the built-in network (default 16)"
    )
    result.add_argument("--blocks", type=int, default=28, help="depth of the random networks (default 28)")
    return result


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if min(args.networks, args.batches, args.blocks) < 1:
            raise SprintError("--networks, --batches and --blocks must be at least 1")
        os.environ["ACCELERATE_USE_CPU"] = "true"
        diffusers_logging.set_verbosity_error()  # a note at every cast
        engine = Engine(Precision.bf16)
        source = built_in()
        cases = random_cases(gains_of(source.network), args.networks, args.blocks)
        random = measure(cases, engine, VARIANTS, args.networks)
        trained = measure(built_in_cases(source, args.batches), engine, VARIANTS, args.batches)
    except SprintError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tables = {"random": summaries(random), "built-in": summaries(trained)}
    worst = min(table[DEFAULT]["cosine"]["min"] for table in tables.values())
    print(page(f"random weights, {args.blocks} blocks, {args.networks} networks", tables["random"]))
    print(page(f"\nbuilt-in network, 4 blocks, {args.batches} batches", tables["built-in"]))
    print(f"\nthe default's cosine at worst: {worst:.5f}, wanted at least {WANTED}")
    results = {"wanted": WANTED, "worst_cosine": worst, "blocks": args.blocks}
    print(write_results("bench_precision-cpu", results | {"tables": tables}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
