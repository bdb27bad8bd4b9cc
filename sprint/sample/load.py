"""A folder or hub id becomes a generator."""

import torch

from sprint.base.names import resolve
from sprint.models.families import load_family
from sprint.models.view import TrigFlowView
from sprint.sample.generate import Generator, StudentGenerator, TeacherGenerator
from sprint.weights.checkpoint import understand
from sprint.weights.load import build_network
from sprint.weights.settings import read_settings


def load_generator(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Generator:
    """A student's or a teacher's generator: which of the two, and its clock, the folder itself tells.

    name     built-in name, pipeline folder of any family, or hub id
    dtype    of network, text encoder and autoencoder; time and noise stay float32

    Raises SprintError where there is no such model.
    """
    checkpoint = understand(resolve(name))
    settings = read_settings(resolve(name))
    family = load_family(name, settings.max_length, settings.instruction, dtype).to(device).channels_last()
    view = TrigFlowView(build_network(checkpoint, dtype).to(device), checkpoint.time_scale)
    kind = StudentGenerator if checkpoint.is_student else TeacherGenerator
    return kind(view.requires_grad_(False), family, settings.size, settings.times)
