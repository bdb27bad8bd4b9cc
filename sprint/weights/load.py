"""Networks with weights in them, from whatever `sprint convert` opens."""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import SanaTransformer2DModel

from sprint.base.errors import SprintError
from sprint.weights.checkpoint import Checkpoint, understand


def empty_network(config: Mapping) -> SanaTransformer2DModel:
    """A network without memory for its weights; fill it by `load_state_dict(..., assign=True)`."""
    with init_empty_weights(include_buffers=False):
        return SanaTransformer2DModel.from_config(dict(config))


def build_network(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, depth: int | None = None
) -> SanaTransformer2DModel:
    """The checkpoint's network in eval mode; with `depth`, only its first blocks between its two ends.

    Weights that are of `dtype` already stay mapped from the file: read them, but do not train them.
    """
    network = empty_network(checkpoint.config | {"num_layers": depth or checkpoint.config["num_layers"]})
    wanted = network.state_dict().keys()
    state = {name: tensor.to(dtype) for name, tensor in checkpoint.stream("diffusers") if name in wanted}
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


def understand_teacher(path_or_id: str | Path, time_scale: float | None = None) -> Checkpoint:
    """A teacher's checkpoint, its weights unread. Raises SprintError as `convert` does, and for a student."""
    checkpoint = understand(path_or_id, time_scale)
    if checkpoint.config["guidance_embeds"]:
        raise SprintError(f"{path_or_id} is a student (it embeds guidance); a teacher is needed here")
    return checkpoint


def load_teacher(
    path_or_id: str | Path, time_scale: float | None = None
) -> tuple[SanaTransformer2DModel, float]:
    """A teacher in fp32 and eval mode, and what multiplies t_fm before its time embedder (1000 or 1).

    Takes every source that `convert` takes. Raises SprintError as `convert` does, and for a student.
    """
    checkpoint = understand_teacher(path_or_id, time_scale)
    network = build_network(checkpoint)
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()  # the file may go, and training writes
    return network, checkpoint.time_scale
