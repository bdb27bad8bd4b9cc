"""Train the tiny teacher on built-in scenes: `make teacher` runs this after tools/make/autoencoder.py.

A base-style `SanaTransformer2DModel` (sparse time, no QK-norm) and a small Gemma2 text encoder learn together by flow
matching, half of the time under fuller captions (`tools.make.captions`). Constant learning rate after a warm-up,
linear decay over the last fifth, EMA. Reads DIR/vae; writes DIR as a diffusers `SanaPipeline` folder in half
precision, with training.json (command, seed, curve of the loss, score and FID over guidance).

The same command again resumes from DIR/state.pt. Since the rate is constant until the decay, so does one with more
steps, from a state saved before the decay began, as if it had been asked for them from the start.
"""

import argparse
import copy
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline
from torch.nn.functional import mse_loss
from tqdm import tqdm

from sprint.base.cpu import keep_freed_memory
from sprint.base.products import fastest_products
from sprint.lab.scenes import render, scene
from sprint.lab.series import TEACHER_SEEDS
from sprint.maths.schedule import shifted_logit_normal_flow_times
from sprint.models.encoders import Family
from sprint.models.sana.encoders import SanaEncoders, tokenize
from sprint.weights.settings import SETTINGS_FILE
from tools.bench.measure import command
from tools.make.captions import described
from tools.make.parts import MAX_LENGTH, Teacher, build_network, build_text_encoder, build_tokenizer
from tools.make.verdict import drawn, guidance_curve, scored

EMA_DECAY = 0.999
TOKENIZER_SCENES = 4000  # whose captions teach the tokenizer its words
TOLD = 4  # captions of a training scene: its own, and fuller ones
PLAIN = 0.5  # how often it is its own
QUICK_PROMPTS, QUICK_GUIDANCES = 120, (2.0, 3.0)  # of the scores on the way
ENCODED_AT_ONCE = 50  # pictures: more take longer each
TEXT_TOKENS = 16  # captions are padded to a multiple of it


def captions_of(series: int, index: int) -> list[str]:
    """TOLD captions of one scene, its own first."""
    plain, rng = scene(series, index), np.random.default_rng([series, index, 1])
    return [plain.caption, *(described(rng, plain).caption for _ in range(TOLD - 1))]


def cached_scenes(path: Path, family: Family, count: int) -> dict[str, torch.Tensor]:
    """`count` training scenes, made once: latent [N, C, h, w] in half precision, ids and mask [N, TOLD, L]."""
    if path.exists():
        return torch.load(path, weights_only=True)
    latents, captions = [], []
    for start in tqdm(range(0, count, ENCODED_AT_ONCE), desc="encoding scenes"):
        numbers = range(start, min(start + ENCODED_AT_ONCE, count))
        pictures = np.stack([render(scene(TEACHER_SEEDS[0], i).things) for i in numbers])
        latents.append(family.encode_pictures(pictures).half())
        captions += [caption for i in numbers for caption in captions_of(TEACHER_SEEDS[0], i)]
    ids, mask, longest = tokenize(family.tokenizer, captions, MAX_LENGTH, instruction=False)
    length = -(-longest // TEXT_TOKENS) * TEXT_TOKENS
    data = {"latent": torch.cat(latents)}
    data |= {
        "ids": ids[:, :length].unflatten(0, (-1, TOLD)),
        "mask": mask[:, :length].unflatten(0, (-1, TOLD)),
    }
    save_atomically(data, path)
    return data


def draw_batch(
    data: dict[str, torch.Tensor], size: int, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """-> latent [B, C, h, w] float32, ids and mask [B, L] of one of each scene's captions"""
    pick = torch.randint(len(data["latent"]), (size,), generator=generator)
    fuller = torch.randint(1, TOLD, (size,), generator=generator)
    told = torch.where(torch.rand(size, generator=generator) < PLAIN, 0, fuller)
    return data["latent"][pick].float(), data["ids"][pick, told], data["mask"][pick, told]


def learning_rate(step: int, steps: int, warmup: int = 200) -> float:
    """Share of the peak: linear warm-up, constant, linear decay over the last fifth."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (0.2 * steps))


def train_step(model, batch, null, generator, device) -> torch.Tensor:
    """Flow matching: ‖v(x_fm, t_fm) − (ε − latent)‖², a tenth of the captions dropped."""
    latent, ids, mask = batch
    dropped = torch.rand(len(ids), 1, generator=generator) < 0.1
    ids, mask = torch.where(dropped, null[0], ids), torch.where(dropped, null[1], mask)
    noise = torch.randn(latent.shape, generator=generator)
    t_fm = shifted_logit_normal_flow_times(len(latent), 1.5, generator)
    t = t_fm[:, None, None, None]
    x_fm = (1 - t) * latent + t * noise
    with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):  # there, products alone are in bf16
        v = model(*(a.to(device) for a in (x_fm, t_fm, ids, mask)))
    return mse_loss(v.float(), (noise - latent).to(device))


def save_atomically(value: dict, path: Path) -> None:
    torch.save(value, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def export(teacher: Teacher, family: Family, record: dict, out: Path) -> None:
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    half = teacher.unhastened()
    pipeline = SanaPipeline(
        tokenizer=family.tokenizer,
        text_encoder=half.text_encoder,
        vae=copy.deepcopy(family.autoencoder).half().cpu().to(memory_format=torch.contiguous_format),
        transformer=half.network,
        scheduler=scheduler,
    )
    pipeline.save_pretrained(out)
    settings = {"text": {"max_length": MAX_LENGTH, "instruction": False}, "size": 64}
    (out / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    (out / "training.json").write_text(json.dumps(record, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scenes", type=int, default=48000, help="distinct training scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--score-every", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=600, help="held-out prompts of the final score")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


class Training:
    """A teacher, what trains it and how far it is; as a whole it is saved to and comes back from DIR/state.pt."""

    def __init__(self, args: argparse.Namespace, autoencoder: AutoencoderDC):
        torch.manual_seed(args.seed)
        self.args = args
        tokenizer = build_tokenizer(
            [caption for i in range(TOKENIZER_SCENES) for caption in captions_of(TEACHER_SEEDS[0], i)]
        )
        self.teacher = Teacher(
            build_text_encoder(len(tokenizer)), build_network(autoencoder.config.latent_channels)
        ).to(args.device)
        self.ema = torch.optim.swa_utils.AveragedModel(
            self.teacher, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
        )
        self.family = SanaEncoders(tokenizer, self.ema.module.text_encoder, autoencoder, MAX_LENGTH, False)
        self.family.to(args.device)
        self.family.channels_last()
        self.optimizer = torch.optim.AdamW(
            self.teacher.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.generator = torch.Generator().manual_seed(args.seed)
        self.step, self.curve, self.seconds, self.began = 0, [], 0.0, time.time()

    def save(self) -> None:
        self.seconds, self.began = self.seconds + time.time() - self.began, time.time()
        parts = {name: getattr(self, name).state_dict() for name in ("teacher", "ema", "optimizer")}
        where = {"step": self.step, "curve": self.curve, "seconds": self.seconds}
        save_atomically(parts | where | {"generator": self.generator.get_state()}, self.args.out / "state.pt")

    def resume(self) -> None:
        if not (self.args.out / "state.pt").exists():
            return
        state = torch.load(self.args.out / "state.pt", weights_only=True)
        for name in ("teacher", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.step, self.curve, self.seconds = state["step"], state["curve"], state["seconds"]

    def update(self, data: dict[str, torch.Tensor], null) -> torch.Tensor:
        """One step -> its loss"""
        self.optimizer.param_groups[0]["lr"] = self.args.lr * learning_rate(self.step, self.args.steps)
        batch = draw_batch(data, self.args.batch, self.generator)
        loss = train_step(self.teacher, batch, null, self.generator, self.args.device)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.teacher.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update_parameters(self.teacher)
        self.step += 1
        return loss.detach()

    def quick_scores(self) -> dict[str, float]:
        view = self.ema.module.view().eval()
        return {
            f"{guidance:g}": round(
                scored(drawn(view, self.family, QUICK_PROMPTS, guidance))["mean_over_samples"], 4
            )
            for guidance in QUICK_GUIDANCES
        }

    def record(self, **scores) -> dict:
        """What training.json says."""
        return {
            "command": command(),
            "seed": self.args.seed,
            "steps": self.args.steps,
            "batch": self.args.batch,
            "threads": torch.get_num_threads(),
            "products of the blocks": fastest_products().__name__,
            "seconds": round(self.seconds),
            "parameters": {
                "network": sum(p.numel() for p in self.teacher.network.parameters()),
                "text_encoder": sum(p.numel() for p in self.teacher.text_encoder.parameters()),
            },
            **scores,
            "curve": self.curve,
        }


def main() -> None:
    args = arguments()
    keep_freed_memory()
    autoencoder = AutoencoderDC.from_pretrained(args.out / "vae").float().eval().requires_grad_(False)
    training = Training(args, autoencoder)
    data = cached_scenes(args.out / "scenes.pt", training.family, args.scenes)
    null = [
        part[:, : data["ids"].shape[2]]
        for part in tokenize(training.family.tokenizer, [""], MAX_LENGTH, False)[:2]
    ]
    training.resume()
    for model in (training.teacher, training.ema.module):
        model.hasten()
    running = []
    training.began = time.time()
    bar = tqdm(range(training.step, args.steps), desc="teacher", initial=training.step, total=args.steps)
    for _ in bar:
        running.append(training.update(data, null))
        if training.step % 100 == 0:
            training.curve.append(
                {"step": training.step, "loss": round(torch.stack(running).mean().item(), 5)}
            )
            bar.set_postfix(loss=training.curve[-1]["loss"])
            running = []
        judged = training.step % args.score_every == 0
        if judged:
            training.curve[-1]["scene_score"] = training.quick_scores()
            tqdm.write(f"step {training.step}: {json.dumps(training.curve[-1])}")
        if judged or training.step % args.save_every == 0 or training.step == args.steps:
            training.save()
        if judged:
            export(training.ema.module, training.family, training.record(), args.out)
    scores = guidance_curve(training.ema.module.view().eval(), training.family, args.prompts)
    export(training.ema.module, training.family, training.record(scores=scores), args.out)
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
