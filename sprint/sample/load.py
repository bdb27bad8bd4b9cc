"""A folder or hub id becomes a generator."""

import torch

from sprint.base.names import resolve
from sprint.models.families import load_family
from sprint.models.view import TrigFlowView
from sprint.sample.generate import Generator, StudentGenerator, TeacherGenerator
from sprint.weights.checkpoint import understand
from sprint.weights.folder import student_of
from sprint.weights.load import build_network
from sprint.weights.settings import settings_of


def load_generator(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    family: str | None = None,
) -> Generator:
    """A student's or a teacher's generator: which of the two, and its clock, the folder itself tells.

    name     built-in name, pipeline folder of any family, a run's folder (its student), or hub id
    family   where tokenizer, text encoder and autoencoder are, if not there
    dtype    of network, text encoder and autoencoder; time and noise stay float32

    Raises SprintError where there is no such model.
    """
    name = student_of(resolve(name))
    around = student_of(resolve(family)) if family else name
    checkpoint = understand(name)
    settings = settings_of(name, family and around)
    encoders = (
        load_family(around, settings.max_length, settings.instruction, dtype).to(device).channels_last()
    )
    view = TrigFlowView(build_network(checkpoint, dtype).to(device), checkpoint.time_scale)
    kind = StudentGenerator if checkpoint.is_student else TeacherGenerator
    return kind(view.requires_grad_(False), encoders, settings.size, settings.times)
