"""What a distance says, on tensors of a few numbers."""

import math

import pytest
import torch

from sprint.doctor.findings import Level
from sprint.doctor.movement import movement
from sprint.doctor.weights import compare, names_of, part_of, tally
from sprint.models.sana.keys import KEYS
from tests.doctor.test_model import found


def weights(scale: float = 1.0, dtype=torch.float32, **others):
    """Two tensors, a block's and the last layer's, by original names."""
    generator = torch.Generator().manual_seed(0)
    names = ("blocks.0.attn.qkv.weight", "final_layer.linear.weight")
    made = {name: (scale * torch.randn(64, 8, generator=generator)).to(dtype) for name in names} | others
    return {name: lambda tensor=tensor: tensor for name, tensor in made.items()}


def said(here, there, level: Level) -> str:
    return found(movement(compare(here, there, KEYS), "T"), level, "movement")


@pytest.mark.parametrize(
    ("scale", "level", "words"),
    [
        (1.0, Level.wrong, "bit for bit: no update was kept"),
        (1 + 5e-5, Level.wrong, "has hardly moved"),
        (1 + 1e-3, Level.note, "less than bfloat16 resolves"),
        (1.05, Level.ok, "0.05 of its norm away from T: "),
        (3.0, Level.wrong, "as far as another network"),
    ],
)
def test_every_distance_has_its_words(scale, level, words):
    assert words in said(weights(scale), weights(), level)


def test_dtypes_are_compared_in_the_coarser_one():
    text = said(weights(), weights(dtype=torch.bfloat16), Level.wrong)
    assert "bit for bit (both rounded to bfloat16)" in text


def test_networks_of_other_names_or_sizes():
    assert "no tensor of the same name" in said(weights(), {}, Level.wrong)
    other = weights(1.05, **{"final_layer.linear.weight": torch.zeros(3)})
    assert "1 tensors have another shape in T: final_layer" in said(other, weights(), Level.wrong)


def test_parts_and_their_distances():
    result = compare(weights(1.5, more=torch.ones(1)), weights(), KEYS)
    assert result.parts.keys() == {"attn", "final_layer"} and result.only_here == ["more"]
    assert result.whole.distance == pytest.approx(0.5)  # of 1,024 numbers, in float64 from float32
    assert compare({}, {}, KEYS).whole.distance == 0
    assert part_of("blocks.11.cross_attn.q_norm.weight", KEYS) == "norms"
    assert part_of("t_embedder.mlp.0.bias", KEYS) == "t_embedder"


def test_a_tally_counts_what_is_broken_and_what_was_rounded():
    counted = tally(weights(1.0, broken=torch.tensor([1.0, math.nan, math.inf])))
    assert (counted.tensors, counted.numbers, counted.broken) == (3, 1027, {"broken": 2})
    assert not counted.rounded
    assert tally(weights(dtype=torch.bfloat16)).rounded is False  # as its dtype says
    rounded = {name: lambda read=read: read().bfloat16().float() for name, read in weights().items()}
    assert tally(rounded).rounded


def test_names_are_cut():
    assert names_of("abcd") == "a, b, c and 1 more" and names_of("ab") == "a, b"
