"""The configs of what stands around a network, looked at before a library builds anything from them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sprint.base.door import read_json, shown
from sprint.base.errors import SprintError

CONFIGS = (
    "model_index.json",
    "text_encoder/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
)
BUILT = ("text_encoder/config.json", "vae/config.json")  # of these modules are made
LARGEST = 2**20  # of their whole numbers: Gemma's vocabulary is a quarter of it
MOST_LAYERS = 512
WIDEST = 2**16  # hidden sizes and channels


def check_parts(folder: Path) -> None:
    """Raise SprintError where a config of this folder is no JSON object, or would build a module of absurd size."""
    for name in CONFIGS:
        file = folder / name
        if not file.exists():
            continue  # the loader says what is missing
        content = read_json(file)
        if name in BUILT:
            for key, number in _whole_numbers(content):
                if abs(number) > _most(key):
                    raise SprintError(f"{file}: {key} is {shown(number)}; at most {_most(key):,} is taken")


def check_room(folder: Path, part: str, make: Callable[[], nn.Module]) -> None:
    """Make the module without memory, and raise SprintError where its files hold fewer bytes than it has weights."""
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in make().parameters())
    held = sum(file.stat().st_size for file in (folder / part).glob("*") if file.is_file())
    if weights > held:
        raise SprintError(
            f"{part}: its config.json describes {weights:,} weights, its files hold {held:,} bytes"
        )


def _most(key: str) -> int:
    if "layers" in key:
        return MOST_LAYERS
    return WIDEST if ("size" in key and "vocab" not in key) or "channels" in key or "head" in key else LARGEST


def _whole_numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every one in a JSON value, by the key that it stands under."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _whole_numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _whole_numbers(inner, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value
