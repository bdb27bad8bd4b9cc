"""A model: whatever `sprint convert` opens. Is it whole, does it fit together, and does it predict pictures?"""

from pathlib import Path
from typing import NamedTuple

import torch

from sprint.base.door import at_home, read_json
from sprint.base.errors import SprintError
from sprint.base.names import resolve
from sprint.doctor.findings import Finding, Level, note, ok, refused, wrong
from sprint.doctor.movement import movement
from sprint.doctor.probe import probe
from sprint.doctor.weights import LARGEST_HALF, Tally, compare, names_of, tally, weights_of
from sprint.models.depth import depth_words
from sprint.models.teacher import SPARSE_TIME
from sprint.weights.checkpoint import Checkpoint, understand
from sprint.weights.hub import folder_here
from sprint.weights.settings import SETTINGS_FILE, Settings, read_settings

HALF = (torch.bfloat16, torch.float16)
ENCODER_PARTS = ("tokenizer", "text_encoder", "vae")


class Opening(NamedTuple):
    """What an option says where no file tells, as `understand` takes it."""

    time_scale: float | None = None
    cross_attention_heads: int | None = None
    sample_size: int | None = None
    weights: str | None = None
    variant: str | None = None


AS_FOUND = Opening()


def examine_model(name: str, against: str | None = None, opening: Opening = AS_FOUND) -> list[Finding]:
    """name      a built-in name, a file, a folder or a hub id
    against   the teacher that it was distilled from: then what has moved is looked at too

    Raises SprintError where nothing has that name.
    """
    try:
        checkpoint = understand(resolve(name), *opening)
    except SprintError as error:
        if not at_home(resolve(name)).exists():
            raise
        return [refused("model", error)]
    counted = tally(weights_of(checkpoint))
    findings = [*_what(checkpoint, counted), *_finite(counted), *_numbers(checkpoint, counted)]
    folder = _root(name)
    settings, about = _settings(name, folder)
    findings += about + _encoders(checkpoint, folder)
    if not counted.broken:
        usable = all(one.level is not Level.wrong for one in findings)
        findings += probe(checkpoint, folder if usable else None, settings)
    return findings + (examine_movement(checkpoint, against) if against else [])


def examine_movement(checkpoint: Checkpoint, teacher: str, called: str = "") -> list[Finding]:
    """How far a model is from `teacher`, which `called` names in the text."""
    try:
        other = understand(resolve(teacher))
    except SprintError as error:
        return [refused("teacher", error)]
    found = compare(weights_of(checkpoint), weights_of(other), checkpoint.family.keys)
    told = depth_words(checkpoint.sizes.depth, other.sizes.depth)
    return [*([ok("depth", told)] if told else []), *movement(found, called or teacher, _role(checkpoint))]


def _role(checkpoint: Checkpoint) -> str:
    return "the student" if checkpoint.is_student else "the model"


# ---- weights ------------------------------------------------------------------------------------------


def _what(checkpoint: Checkpoint, counted: Tally) -> list[Finding]:
    role = "a student (embeds guidance)" if checkpoint.is_student else "a teacher (embeds no guidance)"
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in counted.dtypes)
    size = f"{checkpoint.family.size_name(checkpoint.config)}, {checkpoint.sizes.depth} blocks"
    clock = "1000·t" if checkpoint.time_scale == SPARSE_TIME else "t itself"
    return [
        ok("model", f"{role}: {size}, {counted.numbers:,} weights, {dtypes}, {checkpoint.layout} names"),
        ok("time", f"{checkpoint.time}: it embeds {clock}, as {checkpoint.time_scale_from} tells"),
    ]


def _finite(counted: Tally) -> list[Finding]:
    if not counted.broken:
        return [ok("weights", f"{counted.tensors} tensors, all finite, the largest {counted.largest:.3g}")]
    return [
        wrong(
            "weights",
            f"{sum(counted.broken.values()):,} numbers in {len(counted.broken)} of {counted.tensors} tensors "
            f"are nan or inf: {names_of(counted.broken)}",
            "nothing can be drawn with these: go back to an earlier checkpoint, and train with a lower "
            "learning rate",
        )
    ]


def _numbers(checkpoint: Checkpoint, counted: Tally) -> list[Finding]:
    """What dtypes and magnitudes may mean."""
    findings = []
    if checkpoint.is_student and torch.float16 in counted.dtypes:
        findings.append(
            note(
                "dtype",
                "float16 weights: trained or sampled in float16, whatever passes 65504 becomes inf",
                "sample in bf16 or fp32 (sprint does), and train with float32 weights",
            )
        )
    elif torch.float32 in counted.dtypes and counted.largest > LARGEST_HALF:
        text = f"the largest weight, {counted.largest:.3g}, is beyond float16"
        findings.append(note("dtype", text, "never load it in float16; bf16 and fp32 hold it"))
    trained = "trained in place they lose every update below 1/256 of a weight"
    if counted.rounded:
        findings.append(
            note(
                "dtype",
                f"float32 in name only: every weight is a bfloat16 number; {trained}",
                "find out whether the trainer kept float32 weights; if not, that is why nothing is learned",
            )
        )
    elif checkpoint.is_student and torch.bfloat16 in counted.dtypes:
        findings.append(note("dtype", f"bfloat16 weights; {trained}", "fine if it was rounded when saved"))
    return findings


# ---- what stands around the network -------------------------------------------------------------------


def _root(name: str) -> Path | None:
    """The folder of the whole pipeline, if it is on this machine."""
    folder = folder_here(resolve(name))
    return folder.parent if folder and folder.name == "transformer" else folder


def _settings(name: str, folder: Path | None) -> tuple[Settings, list[Finding]]:
    if folder is None or not (folder / SETTINGS_FILE).exists():
        return Settings(), []
    try:
        settings = read_settings(str(folder))
    except SprintError as error:
        return Settings(), [refused("settings", error)]
    instruction = "behind the instruction" if settings.instruction else "as they are"
    text = f"prompts of at most {settings.max_length} tokens, {instruction}"
    text += f"; {settings.size} pixels" if settings.size else ""
    text += f"; own times for {len(settings.times)} numbers of steps" if settings.times else ""
    return settings, [ok("settings", text)]


def _encoders(checkpoint: Checkpoint, folder: Path | None) -> list[Finding]:
    """Whether text encoder and autoencoder are there, and of the widths that the network takes."""
    there = [part for part in ENCODER_PARTS if folder and (folder / part).is_dir()]
    if len(there) < len(ENCODER_PARTS):
        missing = ", ".join(part for part in ENCODER_PARTS if part not in there)
        return [
            note(
                "encoders",
                f"no {missing} beside the network",
                "it can be trained and evaluated with teacher_family=FOLDER, a folder that has them",
            )
        ]
    try:
        text = read_json(folder / "text_encoder" / "config.json")
        vae = read_json(folder / "vae" / "config.json")
    except SprintError as error:
        return [refused("encoders", error)]
    nested = text.get("text_config")
    width = (nested if isinstance(nested, dict) else text).get("hidden_size")
    sizes = checkpoint.sizes
    findings = []
    for what, gives, takes in (
        ("texts", width, sizes.text_width),
        ("latents", vae.get("latent_channels"), sizes.channels),
    ):
        if gives is not None and gives != takes:
            findings.append(
                wrong(
                    "encoders",
                    f"its encoder gives {what} {gives} wide, the network takes {takes}",
                    "these parts are of different models: take encoder and network from one folder",
                )
            )
    scale = vae.get("scaling_factor")
    if scale in (None, 0, 1):
        findings.append(
            note(
                "encoders",
                f"the autoencoder's scaling_factor is {scale}",
                "latents should have a deviation of about 1 (σ_d = 0.5 is applied on top): check its config.json",
            )
        )
    said = f"text encoder {width} wide, autoencoder of {sizes.channels} channels: they fit"
    return findings or [ok("encoders", said)]
