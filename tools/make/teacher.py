"""Train the tiny teacher on built-in scenes: `make teacher` runs this after tools/make/autoencoder.py.

A base-style `SanaTransformer2DModel` (sparse time, no QK-norm) and a small Gemma2 text encoder learn
together by flow matching. Constant learning rate after a warm-up, linear decay over the last fifth, EMA.
Reads DIR/vae; writes DIR as a diffusers `SanaPipeline` folder in half precision, with training.json
(command, seed, curve, scores). The same command again resumes from DIR/state.pt.
"""

import argparse
import copy
import json
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.functional import mse_loss
from tqdm import tqdm
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from sprint.lab.reader import score
from sprint.lab.scenes import render, scene
from sprint.lab.series import HELD_OUT_SEED, TEACHER_SEEDS
from sprint.maths.samplers import Noise, sample_ode
from sprint.maths.schedule import shifted_logit_normal_flow_times, teacher_times
from sprint.models.encoders import Family
from sprint.models.guidance import guided_velocity, with_null
from sprint.models.sana.encoders import SanaEncoders, tokenize
from sprint.models.teacher import SPARSE_TIME
from sprint.models.view import TrigFlowView
from sprint.weights.settings import SETTINGS_FILE
from tools.bench.measure import command

WIDTH, DEPTH, HEAD_DIM, TEXT_WIDTH = 128, 4, 32, 128
VOCABULARY = 448  # 5 special tokens, 256 bytes, the rest learned
MAX_LENGTH = 32  # tokens; the longest caption has 15
EMA_DECAY = 0.999


def build_tokenizer(captions: list[str]) -> GemmaTokenizer:
    """Gemma's kind of tokenizer (BPE with byte fallback, ▁ for spaces) with merges learned on scenes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_previous")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special + byte_tokens, show_progress=False
    )
    bpe.train_from_iterator((caption.replace(" ", "▁") for caption in captions), trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = GemmaTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=8192)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer


def build_text_encoder(vocabulary: int) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=8192,
    )
    return Gemma2Model(config)


def build_network(channels: int) -> SanaTransformer2DModel:
    heads = WIDTH // HEAD_DIM
    return SanaTransformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=heads,
        attention_head_dim=HEAD_DIM,
        num_layers=DEPTH,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=8,
        patch_size=1,
    )


class Teacher(torch.nn.Module):
    """Text encoder and network, trained as one."""

    def __init__(self, text_encoder: Gemma2Model, network: SanaTransformer2DModel):
        super().__init__()
        self.text_encoder, self.network = text_encoder, network

    def forward(self, x_fm, t_fm, ids, mask):
        text = self.text_encoder(ids, attention_mask=mask)[0]
        return self.network(
            x_fm,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=t_fm * SPARSE_TIME,
            return_dict=False,
        )[0]


def cached_scenes(path: Path, family: Family, count: int) -> dict[str, torch.Tensor]:
    """Latents (half precision), token ids and masks of `count` training scenes, made once."""
    if path.exists():
        return torch.load(path, weights_only=True)
    latents, captions = [], []
    for start in tqdm(range(0, count, 250), desc="encoding scenes"):
        scenes = [scene(TEACHER_SEEDS[0], i) for i in range(start, min(start + 250, count))]
        pictures = np.stack([render(s.things) for s in scenes])
        latents.append(family.encode_pictures(pictures).half())
        captions += [s.caption for s in scenes]
    ids, mask, _ = tokenize(family.tokenizer, captions, MAX_LENGTH, instruction=False)
    longest = int(mask.sum(1).max())
    data = {"latent": torch.cat(latents), "ids": ids[:, :longest], "mask": mask[:, :longest]}
    torch.save(data, path)
    return data


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
    with torch.autocast(device, torch.bfloat16):
        v = model(*(a.to(device) for a in (x_fm, t_fm, ids, mask)))
    return mse_loss(v.float(), (noise - latent).to(device))


@torch.no_grad()
def scene_score(teacher: Teacher, family: Family, prompts: int, steps: int, scale: float) -> dict:
    """The reader's verdict on `prompts` held-out scenes drawn with guidance."""
    family.text_encoder = teacher.text_encoder
    view = TrigFlowView(teacher.network, SPARSE_TIME).eval()
    null_text, null_mask = family.encode_prompts([""])
    pictures, claims = [], []
    for start in range(0, prompts, 100):
        scenes = [scene(HELD_OUT_SEED, i) for i in range(start, min(start + 100, prompts))]
        text, mask = family.encode_prompts([s.caption for s in scenes])
        guidance_scale = torch.full((len(scenes),), scale, device=text.device)

        guided = with_null(text, mask, null_text, null_mask)
        F = partial(guided_velocity, view, guided=guided, guidance_scale=guidance_scale)
        noise = Noise(
            list(range(start, start + len(scenes))), (view.network.config.in_channels, 8, 8), text.device
        )
        latent = sample_ode(F, noise, teacher_times(steps))
        pictures.append(family.decode_latents(latent))
        claims += [s.claim for s in scenes]
    return score(np.concatenate(pictures), claims)


def save_atomically(value: dict, path: Path) -> None:
    torch.save(value, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def export(teacher: Teacher, family: Family, record: dict, out: Path) -> None:
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    half = copy.deepcopy(teacher).half().cpu()
    pipeline = SanaPipeline(
        tokenizer=family.tokenizer,
        text_encoder=half.text_encoder,
        vae=copy.deepcopy(family.autoencoder).half().cpu(),
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
    parser.add_argument("--steps", type=int, default=8500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scenes", type=int, default=48000, help="distinct training scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=600, help="held-out prompts of the final score")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    autoencoder = AutoencoderDC.from_pretrained(args.out / "vae").float().eval().requires_grad_(False)
    tokenizer = build_tokenizer([scene(TEACHER_SEEDS[0], i).caption for i in range(4000)])
    teacher = Teacher(
        build_text_encoder(len(tokenizer)), build_network(autoencoder.config.latent_channels)
    ).to(args.device)
    family = SanaEncoders(tokenizer, teacher.text_encoder, autoencoder, MAX_LENGTH, False).to(args.device)
    data = cached_scenes(args.out / "scenes.pt", family, args.scenes)
    null = tokenize(tokenizer, [""], MAX_LENGTH, False)[:2]
    null = [part[:, : data["ids"].shape[1]] for part in null]

    ema = torch.optim.swa_utils.AveragedModel(
        teacher, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )
    optimizer = torch.optim.AdamW(teacher.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(args.seed)
    state = {"step": 0, "seconds": 0.0, "curve": []}
    saved = args.out / "state.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        teacher.load_state_dict(state.pop("teacher"))
        ema.load_state_dict(state.pop("ema"))
        optimizer.load_state_dict(state.pop("optimizer"))
        generator.set_state(state.pop("generator"))
    compiled = torch.compile(teacher)
    started = time.time() - state["seconds"]

    def record(**scores) -> dict:
        return {
            "command": command(),
            "seed": args.seed,
            "steps": args.steps,
            "batch": args.batch,
            "seconds": round(time.time() - started),
            "parameters": {
                "network": sum(p.numel() for p in teacher.network.parameters()),
                "text_encoder": sum(p.numel() for p in teacher.text_encoder.parameters()),
            },
            **scores,
            "curve": state["curve"],
        }

    bar, running = tqdm(range(state["step"], args.steps), desc="teacher", initial=state["step"]), []
    for step in bar:
        pick = torch.randint(len(data["latent"]), (args.batch,), generator=generator)
        batch = data["latent"][pick].float(), data["ids"][pick], data["mask"][pick]
        loss = train_step(compiled, batch, null, generator, args.device)
        optimizer.param_groups[0]["lr"] = args.lr * learning_rate(step, args.steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(teacher)
        running.append(loss.detach())
        if (step + 1) % 100 == 0:
            state["curve"].append({"step": step + 1, "loss": round(torch.stack(running).mean().item(), 5)})
            bar.set_postfix(loss=state["curve"][-1]["loss"])
            running = []
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            quick = scene_score(ema.module, family, 120, 20, 4.5)
            state["curve"][-1]["scene_score"] = round(quick["mean_over_samples"], 4)
            tqdm.write(f"step {step + 1}: {json.dumps(quick)}")
            state |= {"step": step + 1, "seconds": time.time() - started}
            weights = {"teacher": teacher.state_dict(), "ema": ema.state_dict()}
            rest = {"optimizer": optimizer.state_dict(), "generator": generator.get_state()}
            save_atomically(state | weights | rest, saved)
            export(ema.module, family, record(), args.out)
    scores = scene_score(ema.module, family, args.prompts, 20, 4.5)
    export(ema.module, family, record(scores=scores), args.out)
    print(scores)


if __name__ == "__main__":
    main()
