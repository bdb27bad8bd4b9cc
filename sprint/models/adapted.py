"""Stage 1's network: the teacher's weights with dense time and QK-RMSNorm.

Two starts. `with_ones` is the paper's: new norm weights at one, the time embedder's weights unchanged
although its input shrinks a thousandfold. `calibrated` keeps the teacher's function as nearly as the
norm allows: norm weights at the teacher's own mean RMS of q and k, and a time embedder fitted in closed
form to the sparse one.
"""

from collections.abc import Iterable

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from sprint.data.batch import Batch
from sprint.models.view import DENSE_TIME, SPARSE_TIME, TrigFlowView

QK_NORM = "rms_norm_across_heads"


def with_ones(teacher: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """The teacher's weights in a network with QK-norm, all new weights at one."""
    config = dict(teacher.config) | {"qk_norm": QK_NORM}
    adapted = SanaTransformer2DModel.from_config(config)
    missing, unexpected = adapted.load_state_dict(teacher.state_dict(), strict=False)
    strays = [key for key in missing if ".norm_q." not in key and ".norm_k." not in key]
    if strays or unexpected:
        raise ValueError(f"weights that do not fit: {[*strays, *unexpected][:3]}")
    return adapted.to(next(teacher.parameters()).device)


@torch.no_grad()
def calibrated(
    teacher: SanaTransformer2DModel,
    batches: Iterable[tuple[Tensor, Tensor, Batch]],
    time_scale: float = SPARSE_TIME,
) -> SanaTransformer2DModel:
    """The teacher's weights, norms set from its own q and k, and the dense time embedder fitted.

    batches  (x_fm [B, C, H, W], t_fm [B], Batch) on which q and k are measured
    """
    adapted = with_ones(teacher)
    for name, rms in measure_qk_rms(teacher, batches, time_scale).items():
        adapted.get_parameter(name).fill_(rms)
    if time_scale != DENSE_TIME:
        fit_dense_time(adapted.time_embed.emb.timestep_embedder, time_scale)
    return adapted


def measure_qk_rms(teacher: SanaTransformer2DModel, batches, time_scale: float) -> dict[str, float]:
    """Root mean square of q and k over width, averaged over tokens and batches, by norm weight's name."""
    sums: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in teacher.named_modules():
        if name.endswith((".to_q", ".to_k")):
            norm = name.replace(".to_", ".norm_") + ".weight"

            def record(module, inputs, output, norm=norm):
                rms = output.float().square().mean(-1).sqrt()
                sums.setdefault(norm, []).append(rms.mean())

            handles.append(module.register_forward_hook(record))
    view = TrigFlowView(teacher, time_scale)
    try:
        for x_fm, t_fm, batch in batches:
            view.flow_velocity(x_fm, t_fm, batch.text, batch.mask)
    finally:
        for handle in handles:
            handle.remove()
    return {norm: torch.stack(values).mean().item() for norm, values in sums.items()}


@torch.no_grad()
def fit_dense_time(
    embedder: TimestepEmbedding, time_scale: float, points: int = 4096, ridge: float = 1e-7
) -> float:
    """Make embedder(features(t)) equal to what it was at features(time_scale · t), t in [0, 1].

    The sinusoids of t itself barely move over [0, 1], but the fastest, sin t, is monotone there: the first
    layer becomes a fan of smooth hinges SiLU(a · (sin t − τ)), the second their least-squares weights.
    -> relative error of the fit (root mean square)
    """
    features = Timesteps(
        num_channels=embedder.linear_1.in_features, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    device = embedder.linear_1.weight.device
    t = torch.linspace(0, 1, points, device=device)
    target = embedder(features(t * time_scale)).double()

    hidden = embedder.linear_1.out_features
    sine = features.num_channels // 2  # its column: cosines come first, then sin t
    place = torch.linspace(-0.05, 1.05, hidden, device=device)
    slope = torch.logspace(0.6, 1.8, 8, device=device).repeat(hidden)[:hidden]  # 4 to 63
    slope[1::2] *= -1
    embedder.linear_1.weight.zero_()
    embedder.linear_1.weight[:, sine] = slope
    embedder.linear_1.bias.copy_(-slope * torch.sin(place))

    basis = embedder.act(embedder.linear_1(features(t))).double()
    basis = torch.cat([basis, torch.ones_like(basis[:, :1])], 1)
    gram = basis.T @ basis / points
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), device=device)
    weights = torch.linalg.solve(gram, basis.T @ target / points)
    embedder.linear_2.weight.copy_(weights[:-1].T)
    embedder.linear_2.bias.copy_(weights[-1])
    error = embedder(features(t)).double() - target
    return (error.square().mean() / target.square().mean()).sqrt().item()


def copy_network(network: nn.Module) -> nn.Module:
    """A detached twin with its own weights."""
    twin = type(network).from_config(network.config)
    twin.load_state_dict(network.state_dict())
    return twin
