"""Train the feature network that FID and KID see built-in scenes with: `sprint/lab/features.py`.

    python -m tools.make.scene_features                     writes weights.safetensors and training.json
    python -m tools.make.scene_features --steps 50 --out X  a quick look
    python -m tools.make.scene_features --guidance 2 --models runs/tiny/teacher:20 runs/tiny/student:1
                                                            adds FID of their pictures to training.json

A few minutes on one core, so it keeps no checkpoints: interrupted, it starts again. The same seed, threads and
versions give the same weights. It learns from scenes with known damage, so that its features tell damage too:

cells    which shape and which colour covers the middle of each of 8×8 cells
change   how far the damage moved each of these cells from the whole scene, whatever the damage
counts   how many things there are of each shape and of each colour, read linearly from the averaged features
damage   how far outlines are ragged, colours mixed and edges blurred, 0 to 1 each, read the same way

At last each feature is divided by its standard deviation over whole scenes, so that in a distance all count
alike: what tells damage hardly varies over whole scenes, and would drown beside colours and positions.
"""

import argparse
import itertools
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool2d,
    conv2d,
    cross_entropy,
    grid_sample,
    interpolate,
    pad,
    smooth_l1_loss,
)
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from sprint.base.files import write_whole
from sprint.evaluate.metrics.gaussian import GaussianStatistics, fid
from sprint.evaluate.metrics.real_scenes import REFERENCE_SCENES
from sprint.evaluate.models import STUDENT, TEACHER
from sprint.evaluate.store import in_batches
from sprint.lab.features import (
    ASSETS,
    FEATURES,
    SceneFeatures,
    scale_pictures,
    scene_backbone,
    scene_features,
)
from sprint.lab.reader import score
from sprint.lab.scenes import (
    BACKGROUND,
    CATEGORIES,
    COLORS,
    SHAPES,
    SIZE,
    Thing,
    render,
    scene,
)
from sprint.lab.series import FEATURES_SEEDS, HELD_OUT_SEED, REFERENCE_SEED, held_out_scenes
from sprint.sample.generate import StudentGenerator
from sprint.sample.load import load_generator
from tools.bench.measure import command

CELLS = 8
NAME_COLORS = ("colors", "color_attr")  # categories whose captions name every colour
PICTURES, BATCH = 600, 50  # of each set in the FID table
PALETTE = torch.tensor(list(COLORS.values()), dtype=torch.float32)
PAGE = torch.tensor(BACKGROUND, dtype=torch.float32)
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-2
NARROWEST = 0.1  # of the average standard deviation of a feature

# ---- damage: float pictures [B, H, W, 3] from 0 to 255, amounts [B] from 0 to 1  -> the same shape ------

MAX_BLUR = 2.5  # pixels, standard deviation
MAX_SHIFT = 5.0  # pixels, standard deviation of how far a point of an outline moves
SHIFT_GRID, MIX_GRID = 16, 8  # a side: points at which smooth noise is drawn


def blurred(pictures: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian over rows and columns; `generator` is not needed."""
    reach = int(3 * MAX_BLUR)
    offset = torch.arange(-reach, reach + 1.0)
    kernel = torch.softmax(-0.5 * (offset / (MAX_BLUR * amount[:, None]).clamp_min(0.05)) ** 2, dim=1)
    kernel = kernel.repeat_interleave(3, dim=0)[:, None]
    x = pictures.permute(0, 3, 1, 2).reshape(1, -1, *pictures.shape[1:3])
    for weight in (kernel[..., None], kernel[:, :, None]):
        side = [0, 0, reach, reach] if weight.shape[2] > 1 else [reach, reach, 0, 0]
        x = conv2d(pad(x, side, mode="replicate"), weight, groups=len(kernel))
    return x.reshape(len(pictures), 3, *pictures.shape[1:3]).permute(0, 2, 3, 1)


def ragged(pictures: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Every point is taken from a little way off, by smooth noise; flat areas stay as they are."""
    side = pictures.shape[1]
    shift = torch.randn(len(pictures), 2, SHIFT_GRID, SHIFT_GRID, generator=generator)
    shift = interpolate(shift, (side, side), mode="bicubic").permute(0, 2, 3, 1) * (2 * MAX_SHIFT / side)
    still = torch.eye(2, 3).expand(len(pictures), 2, 3)
    place = nn.functional.affine_grid(still, (len(pictures), 3, side, side), align_corners=False)
    place = place + shift * amount[:, None, None, None]
    moved = grid_sample(pictures.permute(0, 3, 1, 2), place, padding_mode="border", align_corners=False)
    return moved.permute(0, 2, 3, 1)


def mixed(pictures: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Parts of the objects, by smooth noise, turn towards another colour of the palette."""
    where = torch.randn(len(pictures), 1, MIX_GRID, MIX_GRID, generator=generator)
    where = torch.sigmoid(3 * interpolate(where, pictures.shape[1:3], mode="bicubic"))[:, 0, ..., None]
    other = PALETTE[torch.randint(len(PALETTE), (len(pictures),), generator=generator)][:, None, None]
    object_share = ((pictures - PAGE).norm(dim=-1, keepdim=True) / 100).clamp(0, 1)
    return pictures + (other - pictures) * where * object_share * amount[:, None, None, None]


DAMAGES = {"ragged": ragged, "mixed": mixed, "blurred": blurred}  # in the order in which they are done


def damaged(pictures: Tensor, amounts: Tensor, generator: torch.Generator) -> Tensor:
    """amounts [B, 3], a column for each of DAMAGES"""
    for damage, amount in zip(DAMAGES.values(), amounts.T, strict=True):
        pictures = damage(pictures, amount, generator)
    return pictures


def random_amounts(count: int, generator: torch.Generator) -> Tensor:
    """Half of the pictures whole; of the others each damage in half, evenly from 0 to 1.  -> [count, 3]"""
    size = count, len(DAMAGES)
    chosen = torch.rand(size, generator=generator) < 0.5
    hurt = torch.rand(count, 1, generator=generator) < 0.5
    return torch.rand(size, generator=generator) * chosen * hurt


# ---- scenes and what is in them --------------------------------------------------------------------------


class Pool(NamedTuple):
    pictures: Tensor  # uint8 [N, H, W, 3]
    shapes: Tensor  # int64 [N, 8, 8]: 0 for none, else 1 + number of the shape
    colors: Tensor  # int64 [N, 8, 8]: the same
    counts: Tensor  # float32 [N, shapes + colours]


def make_pool(seed: int, count: int) -> Pool:
    """Scenes 0 to count − 1 of series `seed`."""
    rows = [_row(scene(seed, i).things) for i in tqdm(range(count), desc="scenes", leave=False)]
    return Pool(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def _row(things: tuple[Thing, ...]) -> tuple[np.ndarray, ...]:
    shapes, colors = np.zeros((2, CELLS, CELLS), np.int64)
    counts = np.zeros(len(SHAPES) + len(COLORS), np.float32)
    middle = (np.arange(CELLS) * SIZE + SIZE // 2) // CELLS
    for thing in things:
        shape, color = SHAPES.index(thing.shape), list(COLORS).index(thing.color)
        alone = render((thing,))[middle][:, middle].astype(float)
        covers = np.linalg.norm(alone - COLORS[thing.color], axis=-1) < np.linalg.norm(
            alone - BACKGROUND, axis=-1
        )
        shapes[covers], colors[covers] = shape + 1, color + 1
        counts[[shape, len(SHAPES) + color]] += 1
    return render(things), shapes, colors, counts


class Told(NamedTuple):
    shapes: Tensor  # logits [B, 5, 8, 8]
    colors: Tensor  # logits [B, 7, 8, 8]
    change: Tensor  # [B, 8, 8]
    counts: Tensor  # [B, shapes + colours]
    damage: Tensor  # [B, 3]


class Reader(nn.Module):
    """The backbone with the heads it is trained by, which are not kept."""

    def __init__(self):
        super().__init__()
        self.backbone = scene_backbone(batch_norm=True)
        self.shapes = nn.Conv2d(FEATURES, 1 + len(SHAPES), 1)
        self.colors = nn.Conv2d(FEATURES, 1 + len(COLORS), 1)
        self.change = nn.Conv2d(FEATURES, 1, 1)
        self.counts = nn.Linear(FEATURES, len(SHAPES) + len(COLORS))
        self.damage = nn.Linear(FEATURES, len(DAMAGES))

    def forward(self, x: Tensor) -> Told:
        cells = self.backbone(x)
        pooled = cells.mean((2, 3))
        maps = self.shapes(cells), self.colors(cells), self.change(cells)[:, 0]
        return Told(*maps, self.counts(pooled), self.damage(pooled))


# ---- training --------------------------------------------------------------------------------------------


def train(steps: int, batch: int, pool: Pool, seed: int) -> tuple[Reader, list[dict]]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    reader = Reader().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(reader.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps + 1, pct_start=0.1)
    curve, bar = [], tqdm(range(steps), desc="scene features")
    for step in bar:
        chosen = torch.randint(len(pool.pictures), (batch,), generator=generator)
        whole = Pool(*(column[chosen] for column in pool))
        amounts = random_amounts(batch, generator)
        hurt = damaged(whole.pictures.float(), amounts, generator)
        told = reader(scale_pictures(hurt))
        losses = {
            "shapes": cross_entropy(told.shapes, whole.shapes),
            "colors": cross_entropy(told.colors, whole.colors),
            "change": 3 * smooth_l1_loss(told.change, cell_change(whole.pictures, hurt), beta=0.1),
            "counts": 10 * smooth_l1_loss(told.counts, whole.counts, beta=0.1),
            "damage": 10 * (told.damage - amounts).square().mean(),
        }
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            curve.append({"step": step} | {name: round(part.item(), 4) for name, part in losses.items()})
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return reader.eval(), curve


def cell_change(whole: Tensor, hurt: Tensor) -> Tensor:
    """Mean distance in RGB over each cell, as a share of 64 levels.  -> [B, 8, 8]"""
    return avg_pool2d((hurt - whole).norm(dim=-1), SIZE // CELLS) / 64


@torch.no_grad()
def finish(backbone: nn.Sequential, pictures: Tensor) -> nn.Sequential:
    """The network that is kept: no batch norm, and features of standard deviation 1 over these pictures.

    A feature that all but never varies is taken as a tenth as wide as the average one. Rounded to half
    precision.
    """
    plain = folded(backbone)
    spread = SceneFeatures(plain)(pictures.numpy()).std(0)
    spread = spread.clamp_min(NARROWEST * spread.mean())
    plain[-2].weight /= spread[:, None, None, None]
    plain[-2].bias /= spread
    return plain.half().float()


def folded(backbone: nn.Sequential) -> nn.Sequential:
    """The same function without batch norm."""
    plain, layers = scene_backbone(), list(backbone)
    convolutions = [
        fuse_conv_bn_eval(a, b) if isinstance(b, nn.BatchNorm2d) else a
        for a, b in itertools.pairwise(layers)
        if isinstance(a, nn.Conv2d)
    ]
    places = [layer for layer in plain if isinstance(layer, nn.Conv2d)]
    for place, convolution in zip(places, convolutions, strict=True):
        place.load_state_dict(convolution.state_dict())
    return plain


@torch.no_grad()
def held_out_accuracy(reader: Reader, pool: Pool, seed: int) -> dict[str, float]:
    """Shares that are right, on whole scenes; and of damage, correlation with the true amounts."""
    generator = torch.Generator().manual_seed(seed)
    amounts = random_amounts(len(pool.pictures), generator)
    whole = reader(scale_pictures(pool.pictures))
    hurt = reader(scale_pictures(damaged(pool.pictures.float(), amounts, generator)))
    things = pool.shapes > 0
    right = {
        "shapes of covered cells": (whole.shapes.argmax(1) == pool.shapes)[things].float().mean(),
        "colors of covered cells": (whole.colors.argmax(1) == pool.colors)[things].float().mean(),
        "all counts of a scene": (whole.counts.round() == pool.counts).all(1).float().mean(),
    }
    for i, name in enumerate(DAMAGES):
        right[f"correlation, {name}"] = torch.corrcoef(torch.stack([hurt.damage[:, i], amounts[:, i]]))[0, 1]
    return {name: round(value.item(), 4) for name, value in right.items()}


# ---- what FID makes of it ----------------------------------------------------------------------------------


def hurt_sets(count: int) -> dict[str, np.ndarray]:
    """Held-out scenes, whole and with one thing wrong with each.  -> uint8 [count, 64, 64, 3] by name"""
    scenes = [scene(HELD_OUT_SEED, i) for i in range(count)]
    whole = torch.from_numpy(np.stack([render(s.things) for s in scenes]))
    sets = {"real": whole.numpy()}
    for name, damage in DAMAGES.items():
        for amount in (0.2, 0.5):
            generator = torch.Generator().manual_seed(0)
            hurt = damage(whole.float(), torch.full((count,), amount), generator)
            sets[f"{name} {amount}"] = hurt.round().clamp(0, 255).byte().numpy()
    for every in (20, 5):
        sets[f"1 scene of {every} lacks an object"] = np.stack(
            [render(s.things[i % every == 0 :]) for i, s in enumerate(scenes)]
        )
    return sets


def fid_table(
    network: SceneFeatures, sets: dict[str, np.ndarray], categories: Sequence[str] = CATEGORIES
) -> dict[str, float]:
    """FID of each set against `REFERENCE_SCENES` real scenes; of both, only those of these categories."""

    def statistics(pictures: np.ndarray) -> GaussianStatistics:
        chosen = [CATEGORIES[i % len(CATEGORIES)] in categories for i in range(len(pictures))]
        return GaussianStatistics.of(network(pictures[chosen]))

    real = [render(scene(REFERENCE_SEED, i).things) for i in range(REFERENCE_SCENES)]
    reference = statistics(np.stack(real))
    return {name: round(fid(statistics(pictures), reference), 5) for name, pictures in sets.items()}


def drawn_sets(models: list[str], count: int, guidance: float) -> dict[str, np.ndarray]:
    """Held-out scenes, the same as the autoencoder gives them back, and what each model, "DIR:STEPS", draws of them."""
    sets, scenes = {}, held_out_scenes(count)
    for model in models:
        folder, _, steps = model.rpartition(":")
        generator = load_generator(folder)
        role = STUDENT if isinstance(generator, StudentGenerator) else TEACHER
        if not sets:
            real = [
                np.stack([render(s.things) for s in scenes[start : start + BATCH]])
                for start in range(0, count, BATCH)
            ]
            family = generator.family
            with torch.inference_mode():
                parts = [family.decode_latents(family.encode_pictures(part)) for part in real]
            sets = {"real": np.concatenate(real), "autoencoder": np.concatenate(parts)}
        name = f"{role}, {steps} step{'s' * (steps != '1')}"
        captions, times = [s.caption for s in scenes], generator.times(int(steps))
        drawn = in_batches(generator, captions, range(count), BATCH, times, guidance)
        sets[name] = np.concatenate(list(drawn))
    return sets


def measure(out: Path, models: list[str], guidance: float) -> None:
    """Add FID of models' pictures, beside their scene scores, to the training record.

    FID also of captions that name every colour: with the others a strongly guided model chooses its favourite
    colours, which the caption allows and a distribution shows.
    """
    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    claims = [s.claim for s in held_out_scenes(PICTURES)]
    sets = drawn_sets(models, PICTURES, guidance)
    network = scene_features(weights=out / "weights.safetensors")
    record["models"] = {
        "command": command(),
        "scene_score": {name: score(p, claims)["mean_over_samples"] for name, p in sets.items()},
        "fid": fid_table(network, sets),
        "fid, captions that name every colour": fid_table(network, sets, NAME_COLORS),
    }
    write_whole(out / "training.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["models"], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pool", type=int, default=12000, help="distinct scenes drawn ahead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--models", nargs="+", metavar="DIR:STEPS", help="do not train: measure these models' pictures"
    )
    parser.add_argument("--guidance", type=float, help="of the models' pictures: needed with --models")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.models and args.guidance is None:
        parser.error("--models needs --guidance: what is best is in the teacher's training.json")
    if args.models:
        measure(args.out, args.models, args.guidance)
        return
    began = time.perf_counter()
    pool = make_pool(FEATURES_SEEDS[args.seed], args.pool)
    reader, curve = train(args.steps, args.batch, pool, args.seed)
    backbone = finish(reader.backbone, pool.pictures[:REFERENCE_SCENES])
    record = {
        "command": command(),
        "seed": args.seed,
        "series": FEATURES_SEEDS[args.seed],
        "threads": args.threads,
        "seconds": round(time.perf_counter() - began),
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "held_out": held_out_accuracy(reader, make_pool(HELD_OUT_SEED, PICTURES), args.seed),
        "fid": {"reference": REFERENCE_SCENES, "pictures": PICTURES}
        | fid_table(SceneFeatures(backbone), hurt_sets(PICTURES)),
        "curve": curve,
    }
    weights = {name: tensor.half().contiguous() for name, tensor in backbone.state_dict().items()}
    write_whole(args.out / "weights.safetensors", save(weights, {"format": "pt"}))
    write_whole(args.out / "training.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: value for name, value in record.items() if name != "curve"}, indent=1))


if __name__ == "__main__":
    main()
