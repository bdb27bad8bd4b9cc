"""The families that there are, and which of them a network, a folder or a name is of.

What a model is called tells nothing here: a network tells by its class, a folder by the class that its config
names or by its tensors' names (`sprint.weights.checkpoint`).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from sprint.base.door import at_home, check_no_address, shown
from sprint.base.errors import SprintError
from sprint.base.finite import check_finite
from sprint.base.names import resolve
from sprint.models.encoders import Family
from sprint.models.parts import check_parts
from sprint.models.sana.family import Sana
from sprint.models.teacher import Teacher

REASON = 300  # characters of a library's own words
FAMILIES: tuple[Teacher, ...] = (Sana(),)


def family_of(network: nn.Module) -> Teacher:
    """Raises TypeError for a network of no family."""
    for family in FAMILIES:
        if isinstance(network, family.network_class):
            return family
    raise TypeError(f"{type(network).__name__} is a network of no family: {titles()}")


def networks_in(module: nn.Module) -> list[ModelMixin]:
    """The networks inside of a module, which may be one itself."""
    classes = tuple(family.network_class for family in FAMILIES)
    return [part for part in module.modules() if isinstance(part, classes)]


def family_of_class(name: str) -> Teacher | None:
    """By the `_class_name` of a network's config.json."""
    return next((family for family in FAMILIES if family.network_class.__name__ == name), None)


def family_of_pipeline(name: str) -> Teacher | None:
    """By the `_class_name` of a model_index.json."""
    return next(
        (one for one in FAMILIES if name in (one.student_pipeline_class, one.teacher_pipeline_class)), None
    )


def family_of_size(name: str) -> Teacher:
    """By the name of a preset. Raises SprintError for a size that there is not."""
    for family in FAMILIES:
        if name in family.presets:
            return family
    sizes = ", ".join(size for family in FAMILIES for size in family.presets)
    raise SprintError(f"no size named {name!r}; choose one of {sizes}")


def titles() -> str:
    return " or ".join(family.title for family in FAMILIES)


def check_role(what: object, family: Teacher, config: Mapping, student: bool) -> None:
    """Raise SprintError where a student is needed and this is a teacher, or the other way round."""
    is_student = family.is_student(config)
    if is_student != student:
        found, needed = ("student", "teacher") if is_student else ("teacher", "student")
        embeds = "guidance" if is_student else "no guidance"
        raise SprintError(f"{what} is a {found} (it embeds {embeds}); a {needed} is needed here")


def load_family(
    name: str, max_length: int = 300, instruction: bool = True, dtype: torch.dtype = torch.float32
) -> Family:
    """The text side and autoencoder of a pipeline's folder, built-in name or hub id, frozen.

    Raises SprintError where there are none, where one of them is not what it should be, or has weights that are not
    finite.
    """
    check_no_address(name)
    folder = str(at_home(resolve(name)))
    # without an index the first family is tried, whose error tells what is missing
    teacher = family_of_pipeline(_pipeline_class(folder)) or FAMILIES[0]
    if Path(folder).is_dir():
        check_parts(Path(folder))
    try:
        family = teacher.load_encoders(folder, max_length, instruction, dtype)
    except SprintError as error:
        raise SprintError(f"{name}: {error}") from error
    except Exception as error:  # the folder may say anything, and the libraries raise anything
        reason = shown(str(error).strip().split("\n")[0], REASON) or "no reason given"
        raise SprintError(
            f"{name}: no tokenizer, text_encoder and vae to load there; name a folder that has them as --family … "
            f"(in a recipe: teacher_family=…) ({type(error).__name__}: {reason})"
        ) from error
    for what, part in (("text_encoder", family.text_encoder), ("vae", family.autoencoder)):
        part.eval().requires_grad_(False)
        check_finite(part.state_dict().items(), f"{name}: {what}")
    return family


def _pipeline_class(folder: str) -> str:
    """What model_index.json says it is; "" where there is none to read."""
    if len(FAMILIES) == 1:
        return ""  # nothing to choose, and the hub is not asked
    try:
        kind = DiffusionPipeline.load_config(folder).get("_class_name", "")
    except (OSError, ValueError):
        return ""
    return kind if isinstance(kind, str) else ""
