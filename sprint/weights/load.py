"""Networks with weights in them, from whatever `sprint convert` opens."""

from pathlib import Path

import torch
from diffusers import ModelMixin

from sprint.models.families import family_of
from sprint.weights.checkpoint import Checkpoint, understand


def empty_like(network: ModelMixin) -> ModelMixin:
    """A network of the same config, without memory for its weights; `load_state_dict(..., assign=True)` fills it."""
    return family_of(network).empty_network(network.config)


def build_network(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    depth: int | None = None,
    rounded: torch.dtype | None = None,
) -> ModelMixin:
    """The checkpoint's network in eval mode; with `depth`, only its first blocks between its two ends.

    rounded   the weights are first rounded to this

    Weights that are of `dtype` already stay mapped from the file: read them, but do not train them. Raises SprintError
    for weights that are not finite.
    """
    family, config = checkpoint.family, checkpoint.config
    network = family.empty_network(family.with_depth(config, depth) if depth else config)
    stream = checkpoint.stream("diffusers", rounded, only=network.state_dict().keys())
    state = {name: tensor.to(dtype) for name, tensor in stream}
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


def understand_teacher(path_or_id: str | Path, time_scale: float | None = None) -> Checkpoint:
    """A teacher's checkpoint, its weights unread. Raises SprintError as `convert` does, and for a student."""
    checkpoint = understand(path_or_id, time_scale)
    checkpoint.check_role(student=False)
    return checkpoint


def load_teacher(path_or_id: str | Path, time_scale: float | None = None) -> tuple[ModelMixin, float]:
    """A teacher in fp32 and eval mode, and what multiplies t_fm before its time embedder (1000 or 1).

    Takes every source that `convert` takes. Raises SprintError as `convert` does, and for a student.
    """
    checkpoint = understand_teacher(path_or_id, time_scale)
    network = build_network(checkpoint)
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()  # the file may go, and training writes
    return network, checkpoint.time_scale
