"""The sCM gradient at the start of stage 2, in any precision and exactly; networks to take it of.

Imported by `bench_precision`; not a program.
"""

import copy
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sprint.base.names import resolve
from sprint.base.random import step_generator
from sprint.data.batch import Batch
from sprint.data.batching import encode
from sprint.data.source import open_source
from sprint.maths import losses
from sprint.maths.dual import value_and_tangent
from sprint.maths.schedule import lognormal_trig_times
from sprint.maths.trigflow import SIGMA_DATA, diffuse
from sprint.models.encoders import Family, encode_null
from sprint.models.families import load_family
from sprint.models.guidance import with_null
from sprint.models.sana.presets import transformer_config
from sprint.models.student import Student, from_adapted
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Recipe
from sprint.train.adapt import draw_flow, noised
from sprint.train.draws import Draws, draw
from sprint.train.start import calibrated
from sprint.train.terms.consistency import teacher_velocity
from sprint.weights.load import load_teacher

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FULL_TANGENT = 1.0  # r
CALIBRATION = 32  # scenes
LATENT = (32, 16, 16)  # of random networks


# ---- what is differentiated -------------------------------------------------------------------------


class Case(NamedTuple):
    """fp32 networks, and in float64 what goes in. The student is in training mode, its log-variance fitted."""

    student: Student
    teacher: SanaTransformer2DModel
    batch: Batch
    null: tuple[Tensor, Tensor]
    draws: Draws


class Outcome(NamedTuple):
    """Of one variant. gradient: by parameter, in float64."""

    D: Tensor
    F_prime: Tensor
    g: Tensor
    gradient: dict[str, Tensor]


def case_of(recipe: Recipe, adapted: SanaTransformer2DModel, batch: Batch, null, step: int) -> Case:
    """The start of stage 2 on `batch`, with the draws of update number `step`."""
    latent_shape = tuple(batch.latent.shape[1:])
    torch.manual_seed(recipe.seed)
    student = Student(from_adapted(adapted)).train()
    density = recipe.distill.consistency.time
    t = lognormal_trig_times(4096, density.mean, density.std, step_generator(recipe.seed, "logvar", 0))
    student.start_log_variance(t, torch.full_like(t, 4.5), losses.settled_logvar(t, math.prod(latent_shape)))
    torch.set_default_dtype(torch.float64)
    try:
        draws = draw(recipe, step, latent_shape)
    finally:
        torch.set_default_dtype(torch.float32)
    return Case(student, adapted, batch, null, draws)


def consistency_gradient(
    case: Case,
    student: Student,
    teacher: TrigFlowView,
    dtype: torch.dtype,
    autocast: bool,
    tangent_of: Student | None = None,
) -> Outcome:
    """L_sCM and its gradient as stage 2 computes them (`sprint.train.terms`), with r = 1.

    `student` and `teacher` are the case's, made ready for a precision; `tangent_of` gives F' in float32 in their stead.
    """
    batch, draws, null = (_cast(tensors, dtype) for tensors in (case.batch, case.draws, case.null))
    t = draws.t

    def F_of(network: Student, x_hat, t):
        return network(x_hat, t, batch.text, batch.mask, draws.guidance)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x_t = diffuse(SIGMA_DATA * batch.latent, draws.noise, t)
        with torch.no_grad():
            D = teacher_velocity(teacher, x_t, draws, with_null(batch.text, batch.mask, *null))
        inputs = x_t / SIGMA_DATA, t, *losses.tangent_inputs(t, D)
        F, F_prime = value_and_tangent(partial(F_of, student), *inputs)
        logvar = student.log_variance(t, draws.guidance)
    if tangent_of is not None:
        with torch.no_grad():
            _, F_prime = value_and_tangent(partial(F_of, tangent_of), *inputs)
    g = losses.consistency_tangent(F.detach(), F_prime, D, x_t, t, FULL_TANGENT)
    g = losses.normalise_tangent(g)
    losses.consistency_loss(F, F.detach(), g, logvar, t).backward()
    gradient = {name: p.grad.double() for name, p in student.named_parameters()}
    return Outcome(D, F_prime, g, gradient)


def _cast(tensors: tuple, dtype: torch.dtype) -> tuple:
    """Every floating tensor of a tuple in `dtype`."""
    cast = [x.to(dtype) if x.is_floating_point() else x for x in tensors]
    return type(tensors)(*cast) if hasattr(tensors, "_fields") else tuple(cast)


class TrueFloat64(TorchFunctionMode):
    """Code that asks for float32 gets float64: diffusers' linear attention, RMSNorm and sinusoids step down."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = Tensor.double if function is Tensor.float else function
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in (kwargs or {}).items()}
        return function(*args, **kwargs)


def exact_gradient(case: Case) -> Outcome:
    """In float64 throughout."""
    student, teacher = (copy.deepcopy(network).double() for network in (case.student, case.teacher))
    with TrueFloat64():
        return consistency_gradient(case, student, TrigFlowView(teacher, DENSE_TIME), torch.float64, False)


# ---- networks ---------------------------------------------------------------------------------------


class BuiltIn(NamedTuple):
    """The repository's own trained network, as stage 1 starts from it: dense time, QK-norm, calibrated."""

    recipe: Recipe
    family: Family
    network: SanaTransformer2DModel


def built_in(batch_size: int = 8) -> BuiltIn:
    recipe = load_recipe(RECIPES / "tiny.yaml", [f"distill.batch_size={batch_size}"])
    family = load_family("tiny", recipe.text.max_length, recipe.text.instruction)
    teacher, time_scale = load_teacher(resolve("tiny"))
    batch = encode(open_source(recipe.data).samples(range(CALIBRATION)), family)
    draws = draw_flow(recipe.seed, -1, CALIBRATION, batch.latent.shape[1:], recipe.adapt.shift, 0.0)
    measured_on = [(noised(batch.latent, draws), draws.t_fm, batch)]
    return BuiltIn(recipe, family, calibrated(teacher.float(), measured_on, time_scale).eval())


def built_in_cases(source: BuiltIn, batches: int) -> Iterator[Case]:
    """The built-in network on different scenes, noise and times."""
    recipe, family, network = source
    size, null = recipe.distill.batch_size, _cast(encode_null(family), torch.float64)
    for step in range(batches):
        scenes = open_source(recipe.data).samples(range(step * size, (step + 1) * size))
        yield case_of(recipe, network, _cast(encode(scenes, family), torch.float64), null, step)


def kind(name: str) -> str:
    """A parameter's name without its block's number."""
    return re.sub(r"blocks\.\d+\.", "", name)


def gains_of(network: nn.Module) -> dict[str, float]:
    """Root mean square times √(fan-in) by kind, averaged over blocks."""
    gains = defaultdict(list)
    for name, p in network.named_parameters():
        gains[kind(name)].append(p.detach().square().mean().sqrt().item() * _fan_in(name, p) ** 0.5)
    return {name: statistics.mean(values) for name, values in gains.items()}


def _fan_in(name: str, p: Tensor) -> int:
    return 1 if p.ndim == 1 or name.endswith("table") else p[0].numel()


def random_network(gains: dict[str, float], seed: int, blocks: int, width: int) -> SanaTransformer2DModel:
    """An adapted teacher with normal weights of the given gains; norm weights are constant."""
    shape = {
        "num_layers": blocks,
        "num_attention_heads": width // 32,
        "num_cross_attention_heads": width // 64,
        "cross_attention_head_dim": 64,
        "cross_attention_dim": width,
        "caption_channels": width,
        "sample_size": LATENT[-1],
    }
    torch.manual_seed(seed)
    network = SanaTransformer2DModel(**transformer_config("0.6b", qk_norm=True) | shape).eval()
    for name, p in network.named_parameters():
        gain = gains[kind(name)]
        if "norm" in name:
            nn.init.constant_(p, gain)
        else:
            nn.init.normal_(p, std=gain / _fan_in(name, p) ** 0.5)
    return network


def random_cases(
    gains: dict[str, float],
    networks: int,
    blocks: int,
    width: int = 256,
    batch_size: int = 4,
    tokens: int = 64,
) -> Iterator[Case]:
    """Networks, latents and texts from different seeds; the paper's densities."""
    for seed in range(networks):
        recipe = load_recipe(RECIPES / "0.6b.yaml", [f"distill.batch_size={batch_size}", f"seed={seed}"])
        network = random_network(gains, seed, blocks, width)
        latent = torch.randn(batch_size, *LATENT, dtype=torch.float64)
        text, null = torch.randn(batch_size + 1, tokens, width, dtype=torch.float64).split([batch_size, 1])
        mask = torch.ones(batch_size + 1, tokens, dtype=torch.int64)
        yield case_of(recipe, network, Batch(latent, text, mask[1:]), (null, mask[:1]), 0)
