"""Stage 2's updates, one-step sampling and the decoder by the clock, on random weights.

Imported by `tools.gpu`; not a program. On a CPU everything here works as well, without figures of memory.
"""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor
from tqdm import tqdm

from sprint.data.batch import Batch
from sprint.engine.engine import Engine
from sprint.maths.samplers import Noise, sample_consistency
from sprint.maths.schedule import student_times
from sprint.models.sana.presets import transformer_config
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from sprint.recipe.schema import Recipe
from sprint.train.distill import DISCRIMINATOR, GENERATOR, DistillStage

TEXT_TOKENS, GUIDANCE = 300, 4.5
PAIRS = 6  # timed updates of the generator, and as many of the discriminator, after one of each
WARMUP_CALLS, TIMED_CALLS = 3, 20

# Sana's autoencoder: AutoencoderDC f32c32, 312,250,275 parameters
STAGE_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
STAGE_CHANNELS = (128, 256, 512, 512, 1024, 1024)
STAGE_SCALES = ((), (), (), (5,), (5,), (5,))
F32C32 = {
    "latent_channels": 32,
    "encoder_block_types": STAGE_BLOCKS,
    "decoder_block_types": STAGE_BLOCKS,
    "encoder_block_out_channels": STAGE_CHANNELS,
    "decoder_block_out_channels": STAGE_CHANNELS,
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": STAGE_SCALES,
    "decoder_qkv_multiscales": STAGE_SCALES,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}


def random_network(preset: str, device: torch.device, student: bool) -> SanaTransformer2DModel:
    """A preset's network as its class initialises it: the adapted teacher's architecture or the student's."""
    torch.manual_seed(0)
    with device:
        return SanaTransformer2DModel(**transformer_config(preset, qk_norm=True, guidance_embeds=student))


def random_text(config: dict, batch_size: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """-> text [B, T, D], mask [B, T] with every token real"""
    text = torch.randn(batch_size, tokens, config["caption_channels"], device=device)
    return text, torch.ones(batch_size, tokens, dtype=torch.int64, device=device)


def latent_shape(config: dict) -> tuple[int, int, int]:
    return config["in_channels"], config["sample_size"], config["sample_size"]


def measure_training(preset: str, recipe: Recipe, pairs: int = PAIRS) -> dict:
    """Time and memory of stage 2's updates by phase, on noise for latents and text.

    preset   an architecture by name, given random weights
    recipe   batch size, precision, optimizers, taps; its teacher and data are not touched
    pairs    timed updates of each phase, after one of each that is not
    """
    engine = Engine(recipe.precision)
    device, size = engine.device, recipe.distill.batch_size
    teacher = random_network(preset, device, student=False)
    shape = latent_shape(teacher.config)
    null = random_text(teacher.config, 1, recipe.text.max_length, device)
    text, mask = random_text(teacher.config, size, recipe.text.max_length, device)
    batch = Batch(torch.randn(size, *shape, device=device), text, mask)
    stage = DistillStage(recipe, engine, teacher, null, shape)
    updates = {GENERATOR: [], DISCRIMINATOR: []}
    for step in tqdm(range(2 * pairs + 2), desc=f"updates of {preset}", leave=False):
        updates[stage.phase(step)].append(timed_update(stage, step, batch))
    return {
        "network": preset,
        "weights": "random",
        "student_parameters": sum(p.numel() for p in stage.student.parameters()),
        "latent": [size, *shape],
        "text": list(text.shape),
        "precision": recipe.precision.value,
        "optimizer": recipe.distill.optimizer.kind.value,
        "activation_checkpointing": recipe.activation_checkpointing,
        "phases": {phase: summary(rows) for phase, rows in updates.items()},
    }


class Update(NamedTuple):
    seconds: float
    peak_bytes: int | None
    loss: float
    skipped: float  # updates without a finite gradient so far


def timed_update(stage: DistillStage, step: int, batch: Batch) -> Update:
    """One update by the clock, the device idle before and after."""
    device = stage.engine.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronise(device)
    began = time.perf_counter()
    means = stage.update(step, batch)
    synchronise(device)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    read = means.read(stage.engine)
    return Update(seconds, peak, read["loss"], read["skipped"])


def summary(updates: list[Update]) -> dict:
    """The first update apart: it fills caches and makes the optimizer's state."""
    first, *timed = updates
    losses = [update.loss for update in updates]
    return {
        "first_update_seconds": round(first.seconds, 4),
        "median_update_seconds": round(statistics.median(update.seconds for update in timed), 4),
        "timed_updates": len(timed),
        "peak_memory_gib": gib(max((update.peak_bytes or 0) for update in timed)) or None,
        "losses": [round(loss, 5) if math.isfinite(loss) else None for loss in losses],
        "losses_finite": all(map(math.isfinite, losses)),
        "skipped_updates": int(updates[-1].skipped),
    }


def measure_sampling(
    preset: str, device: torch.device, dtype: torch.dtype, tokens: int = TEXT_TOKENS, calls: int = TIMED_CALLS
) -> dict:
    """Latency of one picture's latent in one step: noise, one forward, the data estimate. No text encoder."""
    network = random_network(preset, device, student=True).to(dtype).eval()
    config, view = network.config, TrigFlowView(network, DENSE_TIME)
    text, mask = random_text(config, 1, tokens, device)
    F = partial(view, text=text, mask=mask, guidance=torch.full((1,), GUIDANCE, device=device))
    times = student_times(1)

    def sample() -> Tensor:
        return sample_consistency(F, Noise([0], latent_shape(config), device), times)

    latent = sample()
    return {
        "network": preset,
        "weights": "random",
        "dtype": str(dtype).removeprefix("torch."),
        "latent": list(latent.shape),
        "latent_finite": bool(torch.isfinite(latent).all()),
        **latency(sample, device, calls),
    }


def measure_decoder(
    config: dict, cells: int, device: torch.device, dtype: torch.dtype, calls: int = TIMED_CALLS
) -> dict:
    """Latency of one picture from its latent of `cells` a side, random weights."""
    torch.manual_seed(0)
    with device:
        autoencoder = AutoencoderDC(**config).to(dtype).eval()
        latent = torch.randn(1, config["latent_channels"], cells, cells, dtype=dtype)

    @torch.no_grad()
    def decode() -> Tensor:
        return autoencoder.decode(latent / config["scaling_factor"]).sample

    return {
        "weights": "random",
        "decoder_parameters": sum(p.numel() for p in autoencoder.decoder.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "picture": list(decode().shape),
        **latency(decode, device, calls),
    }


def latency(call: Callable[[], Tensor], device: torch.device, calls: int) -> dict:
    """Milliseconds of one call after a warm-up, the device idle before and after each."""
    for _ in range(WARMUP_CALLS):
        call()
    seconds = []
    for _ in range(calls):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    spread = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    figures = {f"{name}_milliseconds": round(1000 * value, 2) for name, value in spread.items()}
    return figures | {"calls": calls}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gib(size: int) -> float:
    return round(size / 2**30, 3)
