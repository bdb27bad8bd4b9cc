"""What a rehearsal distils: a random teacher of a recipe's real size, small random encoders, captioned pictures.

    python -m tools.rehearsal.family 0.6b FOLDER

FOLDER/random-teacher   a diffusers folder; every weight is random, in bf16. The network is as large as the real one;
                        of the encoders only the widths are: text states, latent channels, pixels per latent cell
FOLDER/pictures         24 scenes of the lab, drawn at the recipe's size, each with its caption
"""

import argparse
import json
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from transformers import Gemma2Config, Gemma2Model

from sprint.base.door import read_json
from sprint.base.files import write_whole
from sprint.base.names import resolve
from sprint.cli.shared import quiet_libraries
from sprint.lab.scenes import SIZE, Thing, render, scene
from sprint.lab.series import HELD_OUT_SEED
from sprint.models.sana.encoders import downscale
from sprint.models.sana.presets import network_shapes, sizes
from sprint.pages.png import write_png
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Recipe
from sprint.train.plan.networks import teacher_config
from sprint.weights.writer import write_safetensors
from tools.bench.random_checkpoint import random_tensors

TEACHER, PICTURES = "random-teacher", "pictures"
COUNT = 24  # pictures
NARROW = 4  # channels of the autoencoder where pictures are large
WEIGHTS = {"format": "pt", "weights": "random"}


def make(recipe: Recipe, folder: Path) -> None:
    """Both folders, anew. The recipe's own teacher, on disk or by its preset, says the sizes; none of its weights
    are read."""
    _, config = teacher_config(recipe)
    teacher = folder / TEACHER
    shutil.rmtree(teacher, ignore_errors=True)
    with resources.as_file(resources.files("sprint.lab") / "tiny") as tiny:
        for part in ("tokenizer", "scheduler"):
            shutil.copytree(tiny / part, teacher / part)
        shutil.copyfile(tiny / "model_index.json", teacher / "model_index.json")
        text = read_json(tiny / "text_encoder" / "config.json")
    write_network(config, teacher / "transformer")
    torch.manual_seed(0)
    text_encoder(text["vocab_size"], sizes(config).text_width).save_pretrained(teacher / "text_encoder")
    autoencoder(sizes(config).channels, pixels_per_cell(recipe)).save_pretrained(teacher / "vae")
    draw_pictures(folder / PICTURES, recipe.data.size)


def write_network(config: dict, folder: Path) -> None:
    """Streamed: no more than a tensor is in memory."""
    folder.mkdir(parents=True)
    write_whole(
        folder / "config.json", json.dumps({"_class_name": "SanaTransformer2DModel"} | config, indent=1)
    )
    specs = {name: (torch.bfloat16, shape) for name, shape in network_shapes(config).items()}
    file = folder / "diffusion_pytorch_model.safetensors"
    write_safetensors(file, specs, random_tensors(specs, seed=0), WEIGHTS)


def text_encoder(vocabulary: int, width: int) -> Gemma2Model:
    """One thin layer of one head, whose states are `width` wide."""
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=8192,
    )
    return Gemma2Model(config).to(torch.bfloat16)


def pixels_per_cell(recipe: Recipe) -> int:
    """Of the real teacher's autoencoder, where it is on disk; else of the public one."""
    config = Path(resolve(recipe.teacher_family or recipe.teacher)).expanduser() / "vae" / "config.json"
    return downscale(read_json(config) if config.is_file() else None)


def autoencoder(channels: int, factor: int) -> AutoencoderDC:
    """One thin block at each size, down to 1/`factor` of the picture's."""
    levels = factor.bit_length()
    widths = (*(min(NARROW * 2**level, channels) for level in range(levels - 1)), channels)
    ends = {
        f"{end}_{name}": value
        for end in ("encoder", "decoder")
        for name, value in {
            "block_types": "ResBlock",
            "block_out_channels": widths,
            "layers_per_block": (1,) * levels,
            "qkv_multiscales": ((),) * levels,
        }.items()
    }
    made = AutoencoderDC(
        latent_channels=channels,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        **ends,
    )
    return made.to(torch.bfloat16)


def draw_pictures(folder: Path, size: int) -> None:
    """NAME.png beside NAME.txt."""
    for index in range(COUNT):
        found = scene(HELD_OUT_SEED, index)
        write_png(folder / f"{index:02d}.png", render(enlarged(found.things, size / SIZE), size))
        write_whole(folder / f"{index:02d}.txt", found.caption + "\n")


def enlarged(things: tuple[Thing, ...], factor: float) -> tuple[Thing, ...]:
    return tuple(
        replace(thing, x=factor * thing.x, y=factor * thing.y, radius=factor * thing.radius)
        for thing in things
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    quiet_libraries()
    make(load_recipe(args.recipe, args.overrides), args.folder)


if __name__ == "__main__":
    main()
