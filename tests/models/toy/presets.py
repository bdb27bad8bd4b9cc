"""The toy's sizes, and the network that a set of tensor shapes describes."""

from collections.abc import Mapping

import torch

from sprint.base.errors import SprintError
from sprint.models.teacher import DENSE_TIME, SPARSE_TIME, Shape, Sizes
from tests.models.toy.blocks import ToyTransformer
from tests.models.toy.pipelines import STUDENT, TEACHER

BASE = {
    **{"dim": 32, "depth": 2, "heads": 4, "channels": 3, "words": 16, "side": 8, "patch": 2},
    **{"normed": False, "guided": False, "clock_scale": 1.0},
}
PRESETS = {"toy": BASE, "toy-deep": BASE | {"depth": 3}}


def preset_config(name: str) -> dict:
    return dict(PRESETS[name])


def size_of(config: Mapping) -> str | None:
    sizes = {(row["depth"], row["dim"]): name for name, row in PRESETS.items()}
    return sizes.get((config["depth"], config["dim"]))


def size_name(config: Mapping) -> str:
    return f"Toy {size_of(config) or 'of its own size'}"


def heads_from(config: Mapping) -> str:
    return "nothing"


def config_from_shapes(shapes: Mapping[str, Shape], given: Mapping, heads: int | None) -> dict:
    if heads is None:
        raise SprintError("give --cross-attention-heads")
    dim, channels, patch, _ = shapes["stem.weight"]
    return {
        "dim": dim,
        "depth": 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("layers.")),
        "heads": heads,
        "channels": channels,
        "words": shapes["reader.weight"][1],
        "side": round(shapes["places"][0] ** 0.5) * patch,
        "patch": patch,
        "normed": any(".norm_q." in key for key in shapes),
        "guided": any(key.startswith("clock.strength.") for key in shapes),
    }


def sizes(config: Mapping) -> Sizes:
    names = ("depth", "dim", "channels", "words", "side", "patch")
    return Sizes(*(config[name] for name in names))


def is_student(config: Mapping) -> bool:
    return config["guided"]


def has_qk_norm(config: Mapping) -> bool:
    return config["normed"]


def adapted_config(config: Mapping) -> dict:
    return dict(config) | {"normed": True}


def student_config(config: Mapping) -> dict:
    return dict(config) | {"guided": True}


def with_depth(config: Mapping, depth: int) -> dict:
    return dict(config) | {"depth": depth}


def meta_network(config: Mapping) -> ToyTransformer:
    with torch.device("meta"):
        return ToyTransformer(**config)


def time_clues(config: Mapping, pipeline: str) -> tuple[list[tuple[str, float | None]], str]:
    scales = {TEACHER: SPARSE_TIME * config.get("clock_scale", 1.0), STUDENT: DENSE_TIME}
    return [("model_index.json", scales.get(pipeline))], "a toy's weights do not tell"
