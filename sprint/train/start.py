"""Stage 1's network: the teacher's weights with dense time and QK-RMSNorm.

Two starts. `with_ones` is the paper's: new norm weights at one, the time embedder's weights unchanged
although its input shrinks a thousandfold. `calibrated` keeps the teacher's function as nearly as the
norm allows: norm weights at the teacher's own mean RMS of q and k, and a time embedder regressed onto the
sparse one.
"""

from collections.abc import Callable, Iterable

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from sprint.data.batch import Batch
from sprint.engine.batches import to_device
from sprint.models.families import family_of
from sprint.models.teacher import DENSE_TIME, SPARSE_TIME
from sprint.models.view import TrigFlowView
from sprint.recipe.schema import AdaptStart
from sprint.train.adapt import draw_flow, noised
from sprint.train.inputs import Inputs

CALIBRATION_BATCHES, CALIBRATION_SIZE = 4, 32


def start_of_adaptation(
    inputs: Inputs,
    teacher: ModelMixin,
    time_scale: float,
    own_time_scale: float = DENSE_TIME,
) -> ModelMixin:
    """The adapted network before its first step, calibrated on the run's own data or at ones, as the recipe says.

    time_scale      the teacher's
    own_time_scale  the adapted network's: dense, or as the teacher's
    """
    recipe, device = inputs.recipe, inputs.engine.device
    if recipe.adapt.start is AdaptStart.ones:
        return with_ones(teacher, recipe.adapt.qk_norm)
    teacher.to(device)
    size = min(CALIBRATION_SIZE, recipe.adapt.batch_size)
    source, batches = inputs.source.batched(size), []
    for i in range(CALIBRATION_BATCHES):
        batch = inputs.encode(source.samples(range(i * size, (i + 1) * size)))
        shape = tuple(batch.latent.shape[1:])
        draws = draw_flow(recipe.seed, -1 - i, size, shape, recipe.adapt.shift, dropout=0.0)
        draws = to_device(draws, device)
        batches.append((noised(batch.latent, draws), draws.t_fm, batch))
    return calibrated(teacher, batches, time_scale, recipe.adapt.qk_norm, own_time_scale)


def with_ones(teacher: ModelMixin, qk_norm: bool = True) -> ModelMixin:
    """The teacher's weights in a network with QK-norm (or as they were), all new weights at one."""
    family, config = family_of(teacher), dict(teacher.config)
    adapted = family.network_class.from_config(family.adapted_config(config) if qk_norm else config)
    missing, unexpected = adapted.load_state_dict(teacher.state_dict(), strict=False)
    strays = set(missing) - {each.norm for each in family.qk(teacher)}
    if strays or unexpected:
        raise ValueError(f"weights that do not fit: {[*strays, *unexpected][:3]}")
    return adapted.to(next(teacher.parameters()).device)


def calibrated(
    teacher: ModelMixin,
    batches: Iterable[tuple[Tensor, Tensor, Batch]],
    time_scale: float = SPARSE_TIME,
    qk_norm: bool = True,
    own_time_scale: float = DENSE_TIME,
) -> ModelMixin:
    """The teacher's weights, norms set from its own q and k, and the dense time embedder fitted.

    batches         (x_fm [B, C, H, W], t_fm [B], Batch) on which q and k are measured
    time_scale      the teacher's
    own_time_scale  the result's; where it is the teacher's the time embedder stays as it is

    A teacher that has QK-norm already (SANA-1.5) keeps its own.
    """
    family, adapted = family_of(teacher), with_ones(teacher, qk_norm)
    if qk_norm and not family.has_qk_norm(teacher.config):
        for name, rms in measure_qk_rms(teacher, batches, time_scale).items():
            nn.init.constant_(adapted.get_parameter(name), rms)
    if time_scale != own_time_scale:
        fit_dense_time(*family.time_mlp(adapted), time_scale)
    return adapted


@torch.no_grad()
def measure_qk_rms(teacher: ModelMixin, batches, time_scale: float) -> dict[str, float]:
    """Root mean square of q and k over width, averaged over tokens and batches, by norm weight's name.

    Of a text's tokens those that the mask shows: padding, of which there may be any amount, is not measured.
    """
    sums: dict[str, list[Tensor]] = {}
    handles, shown = [], None
    for projection, norm, of_text in family_of(teacher).qk(teacher):

        def record(module, inputs, output, norm=norm, of_text=of_text):
            rms = output.float().square().mean(-1).sqrt()
            sums.setdefault(norm, []).append(rms[shown].mean() if of_text else rms.mean())

        handles.append(teacher.get_submodule(projection).register_forward_hook(record))
    view = TrigFlowView(teacher, time_scale)
    try:
        for x_fm, t_fm, batch in batches:
            shown = batch.mask.bool()
            view.flow_velocity(x_fm, t_fm, batch.text, batch.mask)
    finally:
        for handle in handles:
            handle.remove()
    return {norm: torch.stack(values).mean().item() for norm, values in sums.items()}


def fit_dense_time(
    embedder: nn.Module,
    features: Callable[[Tensor], Tensor],
    time_scale: float,
    steps: int = 1000,
    points: int = 1024,
    lr: float = 3e-3,
) -> float:
    """Regress embedder(features(t)) onto what it was at features(time_scale · t), t in [0, 1].

    Adam from the embedder's own weights, seconds of work. A closed-form fit by a fan of hinges is twice as
    exact, and useless: its large activations turn every later update of the weights into a jolt.
    -> relative error of the fit (root mean square)
    """
    t = torch.linspace(0, 1, points, device=next(embedder.parameters()).device)
    with torch.no_grad():
        target = embedder(features(t * time_scale))
    dense = features(t)
    optimizer = torch.optim.Adam(embedder.parameters(), lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    flags = [p.requires_grad for p in embedder.parameters()]
    embedder.requires_grad_(True)
    for _ in range(steps):
        optimizer.zero_grad()
        error = (embedder(dense) - target).square().mean()
        error.backward()
        optimizer.step()
        decay.step()
    optimizer.zero_grad()
    for parameter, flag in zip(embedder.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    return (error.detach() / target.square().mean()).sqrt().item()
