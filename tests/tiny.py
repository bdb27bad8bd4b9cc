"""Networks, batches and recipes of a few thousand numbers, made from seeds."""

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor

from sprint.data.batch import Batch
from sprint.recipe.schema import (
    Adapt,
    Adversarial,
    Consistency,
    Data,
    Distill,
    Optimizer,
    OptimizerKind,
    Recipe,
    Text,
)

CHANNELS, SIZE, WIDTH, TEXT_WIDTH, TOKENS, DEPTH = 4, 4, 32, 8, 5, 2
LATENT = (CHANNELS, SIZE, SIZE)
QK_NORM = "rms_norm_across_heads"


def tiny_network(
    seed: int = 0, qk_norm: bool = True, guidance_embeds: bool = False, **config
) -> SanaTransformer2DModel:
    """Two blocks, 32 wide. No two weights are equal, so nothing that should matter is zero."""
    torch.manual_seed(seed)
    network = SanaTransformer2DModel(
        **{
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": WIDTH // 2,
            "num_layers": DEPTH,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": WIDTH // 2,
            "cross_attention_dim": WIDTH,
            "caption_channels": TEXT_WIDTH,
            "sample_size": SIZE,
            "patch_size": 1,
            "qk_norm": QK_NORM if qk_norm else None,
            "guidance_embeds": guidance_embeds,
        }
        | config
    ).eval()
    for name, p in network.named_parameters():
        p.data = 0.15 * torch.randn_like(p) + ("norm" in name)
    return network


def tiny_batch(size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Random latents; every other prompt is two tokens short."""
    generator = torch.Generator().manual_seed(1000 + seed)
    latent = torch.randn(size, *LATENT, generator=generator, dtype=dtype)
    text = torch.randn(size, TOKENS, TEXT_WIDTH, generator=generator, dtype=dtype)
    mask = torch.ones(size, TOKENS, dtype=torch.long)
    mask[::2, -2:] = 0
    return Batch(latent, text, mask)


def tiny_null(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A null prompt of one real token."""
    generator = torch.Generator().manual_seed(2000)
    mask = torch.zeros(1, TOKENS, dtype=torch.long)
    mask[:, 0] = 1
    return torch.randn(1, TOKENS, TEXT_WIDTH, generator=generator, dtype=dtype), mask


def tiny_recipe() -> Recipe:
    """Both stages in a few steps of eight samples; a test changes what it is about."""

    def adamw(lr: float) -> Optimizer:
        return Optimizer(OptimizerKind.adamw, lr, betas=(0.9, 0.99), clip_norm=1.0)

    return Recipe(
        name="test",
        teacher="random",
        data=Data(size=64),
        text=Text(max_length=20, instruction=False),
        adapt=Adapt(steps=6, batch_size=8, optimizer=adamw(1e-3)),
        distill=Distill(
            steps=6,
            batch_size=8,
            consistency=Consistency(tangent_warmup_updates=4),
            adversarial=Adversarial(taps=(0, 1), optimizer=adamw(3e-4)),
            ema_decay=0.9,
            optimizer=adamw(1e-3),
        ),
        save_every=100,
        log_every=1,
    )


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
