"""Stage 1's network: the teacher's weights with dense time and QK-RMSNorm.

Two starts. `with_ones` is the paper's: new norm weights at one, the time embedder's weights unchanged
although its input shrinks a thousandfold. `calibrated` keeps the teacher's function as nearly as the
norm allows: norm weights at the teacher's own mean RMS of q and k, and a time embedder regressed onto the
sparse one.
"""

from collections.abc import Iterable

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from sprint.data.batch import Batch
from sprint.engine.batches import to_device
from sprint.models.sana.presets import QK_NORM
from sprint.models.view import DENSE_TIME, SPARSE_TIME, TrigFlowView
from sprint.recipe.schema import AdaptStart
from sprint.train.adapt import draw_flow, noised
from sprint.train.inputs import Inputs

CALIBRATION_BATCHES, CALIBRATION_SIZE = 4, 32


def start_of_adaptation(
    inputs: Inputs,
    teacher: SanaTransformer2DModel,
    time_scale: float,
    own_time_scale: float = DENSE_TIME,
) -> SanaTransformer2DModel:
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


def with_ones(teacher: SanaTransformer2DModel, qk_norm: bool = True) -> SanaTransformer2DModel:
    """The teacher's weights in a network with QK-norm (or as they were), all new weights at one."""
    config = dict(teacher.config) | ({"qk_norm": QK_NORM} if qk_norm else {})
    adapted = SanaTransformer2DModel.from_config(config)
    missing, unexpected = adapted.load_state_dict(teacher.state_dict(), strict=False)
    strays = [key for key in missing if ".norm_q." not in key and ".norm_k." not in key]
    if strays or unexpected:
        raise ValueError(f"weights that do not fit: {[*strays, *unexpected][:3]}")
    return adapted.to(next(teacher.parameters()).device)


def calibrated(
    teacher: SanaTransformer2DModel,
    batches: Iterable[tuple[Tensor, Tensor, Batch]],
    time_scale: float = SPARSE_TIME,
    qk_norm: bool = True,
    own_time_scale: float = DENSE_TIME,
) -> SanaTransformer2DModel:
    """The teacher's weights, norms set from its own q and k, and the dense time embedder fitted.

    batches         (x_fm [B, C, H, W], t_fm [B], Batch) on which q and k are measured
    time_scale      the teacher's
    own_time_scale  the result's; where it is the teacher's the time embedder stays as it is

    A teacher that has QK-norm already (SANA-1.5) keeps its own.
    """
    adapted = with_ones(teacher, qk_norm)
    if qk_norm and teacher.config.qk_norm is None:
        for name, rms in measure_qk_rms(teacher, batches, time_scale).items():
            nn.init.constant_(adapted.get_parameter(name), rms)
    if time_scale != own_time_scale:
        fit_dense_time(adapted.time_embed.emb.timestep_embedder, time_scale)
    return adapted


@torch.no_grad()
def measure_qk_rms(teacher: SanaTransformer2DModel, batches, time_scale: float) -> dict[str, float]:
    """Root mean square of q and k over width, averaged over tokens and batches, by norm weight's name.

    Of a text's tokens those that the mask shows: padding, of which there may be any amount, is not measured.
    """
    sums: dict[str, list[Tensor]] = {}
    handles, shown = [], None
    for name, module in teacher.named_modules():
        if name.endswith((".to_q", ".to_k")):
            norm = name.replace(".to_", ".norm_") + ".weight"
            of_text = name.endswith(".attn2.to_k")

            def record(module, inputs, output, norm=norm, of_text=of_text):
                rms = output.float().square().mean(-1).sqrt()
                sums.setdefault(norm, []).append(rms[shown].mean() if of_text else rms.mean())

            handles.append(module.register_forward_hook(record))
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
    embedder: TimestepEmbedding, time_scale: float, steps: int = 1000, points: int = 1024, lr: float = 3e-3
) -> float:
    """Regress embedder(features(t)) onto what it was at features(time_scale · t), t in [0, 1].

    Adam from the embedder's own weights, seconds of work. A closed-form fit by a fan of hinges is twice as
    exact, and useless: its large activations turn every later update of the weights into a jolt.
    -> relative error of the fit (root mean square)
    """
    features = Timesteps(
        num_channels=embedder.linear_1.in_features, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    t = torch.linspace(0, 1, points, device=embedder.linear_1.weight.device)
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
