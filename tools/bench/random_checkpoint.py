"""Write a Sana checkpoint of random weights: the right keys and shapes, and nothing learned.

    python -m tools.bench.random_checkpoint 0.6b random.safetensors --layout original --dtype fp32

Streamed, so that any size fits in memory; the file's metadata says that the weights are random.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sprint.base.dtypes import DTYPES
from sprint.models.sana.keys import KEYS
from sprint.models.sana.presets import PRESETS, network_shapes, transformer_config
from sprint.weights.keys import expected_shapes, rules_for
from sprint.weights.writer import Spec, whole_or_nothing, write_safetensors

TEXT_TOKENS = 300


def random_tensors(specs: dict[str, Spec], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Matrices with unit gain, vectors of small noise (norm weights around one)."""
    random = torch.Generator().manual_seed(seed)
    for name, (dtype, shape) in specs.items():
        fan_in = torch.Size(shape[1:]).numel()
        tensor = torch.randn(shape, generator=random) * (fan_in**-0.5 if len(shape) > 1 else 0.02)
        yield name, (tensor + ("norm" in name)).to(dtype)


def write_random_checkpoint(size: str, out: Path, layout: str, dtype: torch.dtype, seed: int = 0) -> None:
    """A base teacher of a preset size; in the original layout with the two buffers that real files carry."""
    config = transformer_config(size)
    network = network_shapes(config)
    shapes = expected_shapes(rules_for(KEYS, network), network, layout)
    if layout == "original":
        width, cells = PRESETS[size].width, PRESETS[size].sample_size ** 2
        shapes |= {
            "y_embedder.y_embedding": (TEXT_TOKENS, config["caption_channels"]),
            "pos_embed": (1, cells, width),
        }
    specs = {name: (dtype, shape) for name, shape in shapes.items()}
    with whole_or_nothing(out) as place:
        write_safetensors(place, specs, random_tensors(specs, seed), {"format": "pt", "weights": "random"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=PRESETS)
    parser.add_argument("out", type=Path, help="a .safetensors file")
    parser.add_argument("--layout", choices=("original", "diffusers"), default="original")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_random_checkpoint(args.size, args.out, args.layout, DTYPES[args.dtype], args.seed)
    print(f"{args.out}: random {args.size} weights, {args.out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
