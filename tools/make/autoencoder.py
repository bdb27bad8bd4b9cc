"""Train the tiny family's autoencoder on built-in scenes: `make teacher` runs this first.

An f8c8 `AutoencoderDC` (8× smaller, 8 channels) of 1.2M parameters. Loss: L1 + squared error, with noise of a tenth
on the latents, so that the decoder forgives a generator's small errors, and with latents held to mean 0 and mean
square 1. Without that hold nothing fixes their scale: it grew 25-fold a stage, to 10⁶, where the residual blocks,
whose outputs are normed, no longer count and half precision overflows.

Writes DIR/vae (diffusers, half precision, scaling factor 1) and DIR/vae/training.json (command, seed, curve, scores,
the largest value inside). Interrupted, it starts again.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC
from tqdm import tqdm

from sprint.lab.reader import score
from sprint.lab.scenes import render, scene
from sprint.lab.series import AUTOENCODER_SEEDS, HELD_OUT_SEED
from tools.bench.measure import command

WIDTHS = (16, 32, 64, 128)
LATENT_CHANNELS = 8
LATENT_NOISE = 0.1  # standard deviation, beside latents of 1
HOLD = 0.1  # weight of `off_scale` in the loss


def build() -> AutoencoderDC:
    stages = len(WIDTHS)
    return AutoencoderDC(
        in_channels=3,
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=16,
        encoder_block_types=("ResBlock",) * stages,
        decoder_block_types=("ResBlock",) * stages,
        encoder_block_out_channels=WIDTHS,
        decoder_block_out_channels=WIDTHS,
        encoder_layers_per_block=(1,) * stages,
        decoder_layers_per_block=(1,) * stages,
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
    )


class NoisyRoundTrip(torch.nn.Module):
    """Encode, disturb, decode.  x_BCHW in [-1, 1] -> (reconstruction_BCHW, latent_BChw)"""

    def __init__(self, autoencoder: AutoencoderDC):
        super().__init__()
        self.encoder, self.decoder = autoencoder.encoder, autoencoder.decoder

    def forward(self, x_BCHW, noise_BChw):
        z_BChw = self.encoder(x_BCHW)
        return self.decoder(z_BChw + LATENT_NOISE * noise_BChw), z_BChw


def off_scale(z_BChw: torch.Tensor) -> torch.Tensor:
    """How far the latents are from mean 0 in every channel and mean square 1 over all: squared, 0 where they are."""
    return z_BChw.mean((0, 2, 3)).square().mean() + (z_BChw.square().mean() - 1).square()


@torch.no_grad()
def divide_latents(autoencoder: AutoencoderDC, scale: float) -> None:
    """Make the encoder give z / scale and the decoder take it: the same round trip, but for rounding.

    Both have a shortcut of fixed weights beside their convolution: z = W∗h + M h and h' = V∗z + R z, where M averages
    groups of channels and R repeats each channel. So W' = (W + M) / scale − M and V' = scale · (V + R) − R, with M
    and R as the middle of a 3×3 kernel. A scale far from 1 would leave differences of nearly equal numbers.
    """
    encode, decode = autoencoder.encoder.conv_out, autoencoder.decoder.conv_in
    latents, channels = encode.weight.shape[:2]
    repeat = torch.eye(latents, dtype=encode.weight.dtype).repeat_interleave(channels // latents, dim=0)
    R, M = torch.zeros_like(decode.weight), torch.zeros_like(encode.weight)
    R[:, :, 1, 1], M[:, :, 1, 1] = repeat, repeat.T * (latents / channels)
    encode.weight.copy_((encode.weight + M) / scale - M)
    encode.bias /= scale
    decode.weight.copy_((decode.weight + R) * scale - R)


@torch.no_grad()
def largest_inside(autoencoder: AutoencoderDC, x_BCHW: torch.Tensor) -> float:
    """The largest magnitude that any layer gives while these pictures go there and back."""
    largest = [0.0]
    hooks = [
        layer.register_forward_hook(lambda _, __, out: largest.append(out.abs().max().item()))
        for part in (autoencoder.encoder, autoencoder.decoder)
        for layer in part.modules()
    ]
    autoencoder(x_BCHW)
    for hook in hooks:
        hook.remove()
    return max(largest)


def pictures(seed: int, count: int) -> torch.Tensor:
    """-> uint8 [count, 3, 64, 64]"""
    drawn = [render(scene(seed, i).things) for i in tqdm(range(count), desc="drawing", leave=False)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def to_unit(x: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] -> float [-1, 1], channels last"""
    return (x.float() / 127.5 - 1).to(memory_format=torch.channels_last)


def train(args: argparse.Namespace) -> tuple[AutoencoderDC, list]:
    torch.manual_seed(args.seed)
    autoencoder = build().to(args.device, memory_format=torch.channels_last)
    round_trip = torch.compile(NoisyRoundTrip(autoencoder))
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=args.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.03
    )
    pool = pictures(AUTOENCODER_SEEDS[args.seed], args.pool)
    curve, bar = [], tqdm(range(args.steps), desc="autoencoder")
    for step in bar:
        x = to_unit(pool[torch.randint(len(pool), (args.batch,))].to(args.device))
        noise = torch.randn(args.batch, LATENT_CHANNELS, 8, 8, device=args.device)
        with torch.autocast(args.device, torch.bfloat16):
            y, z = round_trip(x, noise)
        error = y.float() - x
        loss = error.abs().mean() + error.square().mean() + HOLD * off_scale(z.float())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.steps - 1:
            mse = error.square().mean().item() / 4  # on the [0, 1] scale
            curve.append({"step": step, "loss": round(loss.item(), 5), "psnr": -10 * np.log10(mse)})
            bar.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{curve[-1]['psnr']:.1f}")
    return autoencoder, curve


@torch.no_grad()
def latent_spread(autoencoder: AutoencoderDC, x_BCHW: torch.Tensor) -> float:
    """Standard deviation of the latents, over all of their channels."""
    return autoencoder.encode(x_BCHW).latent.std().item()


@torch.no_grad()
def reconstructions_read(autoencoder: AutoencoderDC, seed: int, count: int = 600) -> float:
    """Share of scenes whose reconstruction still shows what the caption says, by the scene reader."""
    scenes = [scene(seed, i) for i in range(count)]
    x = to_unit(torch.from_numpy(np.stack([render(s.things) for s in scenes])).permute(0, 3, 1, 2))
    y = torch.cat([autoencoder(part).sample for part in x.split(100)])
    pictures = ((y / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return score(pictures, [s.claim for s in scenes])["mean_over_samples"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--pool", type=int, default=16000, help="distinct scenes drawn ahead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    started = time.time()
    autoencoder, curve = train(args)
    held_out = to_unit(pictures(AUTOENCODER_SEEDS[args.seed + 1], 512))
    autoencoder = autoencoder.float().cpu().eval()
    divide_latents(autoencoder, latent_spread(autoencoder, held_out))
    autoencoder.half().register_to_config(scaling_factor=1.0)
    autoencoder.save_pretrained(args.out / "vae")
    autoencoder.float()
    with torch.no_grad():
        mse = (autoencoder(held_out).sample - held_out).square().mean().item() / 4
    record = {
        "command": command(),
        "seed": args.seed,
        "steps": args.steps,
        "batch": args.batch,
        "seconds": round(time.time() - started),
        "parameters": sum(p.numel() for p in autoencoder.parameters()),
        "held_out_psnr": round(-10 * np.log10(mse), 2),
        "held_out_reconstructions_read": reconstructions_read(autoencoder, HELD_OUT_SEED),
        "latent_std": round(latent_spread(autoencoder, held_out), 4),
        "largest_inside": round(largest_inside(autoencoder, held_out), 1),
        "curve": curve,
    }
    (args.out / "vae" / "training.json").write_text(json.dumps(record, indent=1))
    print({k: v for k, v in record.items() if k != "curve"})


if __name__ == "__main__":
    main()
