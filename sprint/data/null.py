"""The null prompt: what guidance subtracts and caption dropout puts in."""

from dataclasses import replace

from torch import Tensor

from sprint.models.family import Family


def encode_null(family: Family) -> tuple[Tensor, Tensor]:
    """The empty prompt with its own mask, never behind the instruction, as diffusers' Sana pipelines do.

    -> text [1, max_length, D], mask [1, max_length]
    """
    return replace(family, instruction=False).encode_prompts([""])
