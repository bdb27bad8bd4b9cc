"""Folders that diffusers opens: a student and an adapted teacher, each as the pipeline of its family.

DIR/model_index.json, scheduler, tokenizer, text_encoder, vae   as diffusers writes them
DIR/transformer   the network, trigflow.json (its clock), logvar.safetensors (a student's loss weighting)
DIR/sprint.json   text settings and picture size, which `sprint sample` reads
DIR/README.md     the model card
"""

from itertools import chain
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin
from safetensors.torch import save_file
from torch import nn

from sprint.base.door import read_json
from sprint.base.finite import check_finite
from sprint.models.encoders import Family
from sprint.models.families import check_role, family_of
from sprint.models.teacher import DENSE_TIME
from sprint.weights.card import Facts, write_card
from sprint.weights.checkpoint import understand
from sprint.weights.folder import complete_or_absent, write_json
from sprint.weights.keys import LOGVAR_KEYS
from sprint.weights.load import build_network
from sprint.weights.locate import SIDE_FILES
from sprint.weights.settings import SETTINGS_FILE
from sprint.weights.trigflow import trigflow_facts, write_trigflow

LOGVAR_FILE = SIDE_FILES[1]
LOGVAR = dict(zip(("weight", "bias"), LOGVAR_KEYS, strict=True))


# ---- the two exports ----------------------------------------------------------------------------------


def export_student(
    folder: Path, network: ModelMixin, logvar: nn.Linear | None, family: Family, facts: Facts
) -> Path:
    """Write a student as a folder that its family's pipeline opens offline.  -> folder

    network   embeds guidance and has dense time; weights are written in the dtype they have
    logvar    Linear(width, 1) of the adaptive loss weighting, for training on; None leaves it out

    Whole or not at all: an earlier export gives way only to a complete one. Raises SprintError for a network
    without guidance or with weights that are not finite, a folder of something else, and a full or read-only disk.
    """
    teacher = family_of(network)
    check_role(f"{folder}: this network", teacher, network.config, student=True)
    _check_weights(folder, network, logvar)
    with complete_or_absent(Path(folder)) as place:
        _save_pipeline(teacher.student_pipeline(family, network), place)
        if logvar is not None:
            head = {name: getattr(logvar, part).detach().contiguous() for part, name in LOGVAR.items()}
            save_file(head, place / "transformer" / LOGVAR_FILE, {"format": "pt"})
        _write_about(place, family, facts)
        write_card(place, facts, Path(folder).absolute().name)
    return Path(folder)


def export_teacher(folder: Path, network: ModelMixin, family: Family, facts: Facts) -> Path:
    """Write an adapted teacher as a folder that its family's pipeline opens offline.  -> folder

    network   embeds no guidance and has dense time, which its config.json also tells as its pipeline reads it

    Otherwise as `export_student`.
    """
    teacher = family_of(network)
    check_role(f"{folder}: this network", teacher, network.config, student=False)
    _check_weights(folder, network)
    with complete_or_absent(Path(folder)) as place:
        _save_pipeline(teacher.teacher_pipeline(family, network), place)
        config = place / "transformer" / "config.json"
        write_json(config, read_json(config) | dict(teacher.dense_config))
        _write_about(place, family, facts)
        write_card(place, facts, Path(folder).absolute().name)
    return Path(folder)


def load_student(folder: str | Path) -> tuple[ModelMixin, nn.Linear | None]:
    """Network in fp32 and eval mode, and the logvar head if the folder has one. Raises SprintError."""
    checkpoint = understand(folder)
    checkpoint.check_role(student=True)
    network = build_network(checkpoint)
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()  # free of the file, which a later export may replace
    extras = dict(checkpoint.stream_extras())
    if not set(LOGVAR_KEYS) <= extras.keys():
        return network, None
    logvar = nn.Linear(checkpoint.sizes.width, 1)
    logvar.load_state_dict({part: extras[name].float() for part, name in LOGVAR.items()})
    return network, logvar


# ---- files --------------------------------------------------------------------------------------------


def _check_weights(folder: Path, *modules: nn.Module | None) -> None:
    tensors = chain.from_iterable(module.state_dict().items() for module in modules if module is not None)
    check_finite(tensors, f"{folder} is not written")


def _save_pipeline(pipeline: DiffusionPipeline, place: Path) -> None:
    """What diffusers writes, less the folders of this machine that the parts were once loaded from."""
    try:
        pipeline.save_pretrained(place)
    except Exception as error:
        if type(error) is Exception:  # how tokenizers reports a full disk
            raise OSError(str(error)) from error
        raise
    for config in place.glob("*/config.json"):
        content = read_json(config)
        if content.pop("_name_or_path", None) is not None:
            write_json(config, content)


def _write_about(place: Path, family: Family, facts: Facts) -> None:
    """trigflow.json, from the files just written, and sprint.json."""
    checkpoint = understand(place, DENSE_TIME)
    text = {"max_length": family.max_length, "instruction": family.instruction}
    size = checkpoint.sizes.side * family.downscale
    settings = {"text": text, "size": size, "recipe": facts.get("recipe")}
    if facts.get("times"):
        settings["times"] = [list(times) for times in facts["times"]]
    write_trigflow(place / "transformer", trigflow_facts(checkpoint, trained=True))
    write_json(place / SETTINGS_FILE, settings)
