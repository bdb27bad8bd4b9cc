"""What an evaluation was asked for, made whole: which metrics, which prompts, with which settings.

What was left open is chosen by the model: a run's own recipe first, then the protocol of its kind of pictures.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sprint.base.door import at_home, check_no_address
from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate.metrics.clip import ClipScore
from sprint.evaluate.metrics.diversity import SeedDiversity
from sprint.evaluate.metrics.fid import FrechetDistance
from sprint.evaluate.metrics.geneval import GenEvalScore
from sprint.evaluate.metrics.metric import Choices, Meter, Metric, Usual
from sprint.evaluate.metrics.pace import Pace
from sprint.evaluate.metrics.registry import CLIP, DIVERSITY, FID, LATENCY, METRICS, PACE, TEACHER_FID
from sprint.evaluate.metrics.scenes import SceneScore
from sprint.evaluate.metrics.teacher_fid import TeacherDistance
from sprint.evaluate.models import TEACHER, Model, own_prompts
from sprint.evaluate.prompts import (
    SCENES,
    Prompts,
    named_prompts,
    no_prompts,
    reference_prompts,
    text_prompts,
)
from sprint.recipe.schema import Evaluate

# of all metrics that look at pictures
METERS = (SceneScore, FrechetDistance, TeacherDistance, SeedDiversity, ClipScore, GenEvalScore, Pace)
GUIDANCE = 4.5
SMALL_BATCH, LARGE_BATCH = 50, 10  # pictures drawn together: as small as scenes, and others
FEATURE_CACHE, REAL_FEATURE_CACHE = "features", ".reference"  # folders: beside result.json, and beside OUT
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # OWNER/NAME


@dataclass(frozen=True)
class Options:
    """What to evaluate and how; what is empty or None is chosen by the model.

    model      student, teacher or run folder, hub id or built-in name; `teacher`: another one, to compare with
    family     folder or hub id of the model's text encoder and autoencoder, where it has none
    metrics    names of `METRICS`;  steps: of the student, or of a teacher that is evaluated alone
    prompts    "scenes", a folder of MJHQ-30K or a text file with a prompt a line
    """

    model: str
    out: Path
    choices: Choices
    teacher: str | None = None
    family: str | None = None
    metrics: Sequence[str] = ()
    steps: Sequence[int] = ()
    prompts: str | None = None
    guidance: float | None = None
    batch_size: int | None = None
    dtype: str = "fp32"
    command: str = ""


def completed(options: Options, models: Sequence[Model], own: Evaluate | None) -> Options:
    """With everything chosen but metrics and prompts.  own: what a run's recipe says"""
    small = all(model.small for model in models)
    batch = own.batch_size if own else SMALL_BATCH if small else LARGE_BATCH
    guidance = own.guidance_scale if own else GUIDANCE
    choices = replace(options.choices, scenes=own and own.prompts, fetch=bool(options.metrics) or not small)
    return replace(
        options,
        choices=choices,
        guidance=guidance if options.guidance is None else options.guidance,
        batch_size=options.batch_size or batch,
    )


def chosen_metrics(names: Sequence[str], models: Sequence[Model]) -> list[Metric]:
    """Those that are named, or those that fit the models, in the order of the table.

    Raises SprintError for a name of none, and for one that compares with a teacher where there is none.
    """
    for name in names:
        if name not in METRICS:
            raise SprintError(f"--metrics {name}: no such metric; there are {', '.join(METRICS)}")
    beside_teacher = len(models) > 1 and any(model.role == TEACHER for model in models)
    if TEACHER_FID.name in names and not beside_teacher:
        raise SprintError(
            f"--metrics {TEACHER_FID.name}: compares with a teacher, and there is one model; give --teacher"
        )
    small = all(model.small for model in models)
    fitting = {Usual.all, Usual.scenes if small else Usual.others}
    if beside_teacher:
        fitting.add(Usual.beside_teacher)
    usual = [metric.name for metric in METRICS.values() if metric.usual in fitting]
    return [metric for metric in METRICS.values() if metric.name in (names or usual)]


def usual_of_own_prompts(options: Options) -> Sequence[str]:
    """Metrics where none is named and a run's own captions are drawn: no scenes, and what tells without references."""
    own = options.prompts is None and own_prompts(options.model)
    return (FID.name, DIVERSITY.name, CLIP.name, PACE.name, LATENCY.name) if own else ()


def main_prompts(options: Options, models: Sequence[Model]) -> Prompts | NotHereError:
    """What FID and CLIP score look at: --prompts, else what --reference or the run gives, or the scenes; or why there
    is none."""
    choices = options.choices
    if options.prompts is None and choices.reference is not None:
        try:
            return reference_prompts(choices.reference, choices.count, choices.seed)
        except NotHereError as error:
            return error
    if options.prompts is None and (own := own_prompts(options.model)):
        return text_prompts(own, choices.count, choices.seed)
    if options.prompts is None and not all(model.small for model in models):
        return no_prompts()
    name = options.prompts or SCENES
    return named_prompts(name, choices.count or (choices.scenes if name == SCENES else None), choices.seed)


def make_meters(
    metrics: Sequence[Metric], choices: Choices, models: Sequence[Model], prompts: Prompts | NotHereError
) -> list[Meter]:
    """Of the metrics that look at pictures. Raises SprintError for one that cannot read the models'."""
    meters: list[Meter] = [meter(choices, prompts) for meter in METERS if meter.metric in metrics]
    for meter in meters:
        for model in models:
            if meter.size not in (None, model.size):
                size = f"{model.size} px" if model.size else "larger ones"
                raise SprintError(
                    f"{meter.metric.name}: reads scenes of {meter.size} px, and {model.path} draws {size}"
                )
    return meters


def check_paths(choices: Choices) -> None:
    """Raises SprintError for a path that is given and not there. What may be a hub id, OWNER/NAME, is none."""
    metadata = choices.geneval_metadata
    on_hub = metadata and HUB_ID.match(metadata) and (":" in metadata or not metadata.endswith(".jsonl"))
    given = {
        "--reference": choices.reference,
        "--inception-weights": choices.inception_weights,
        "--clip-model": None if HUB_ID.fullmatch(choices.clip_model or "") else choices.clip_model,
        "--geneval-detector": (
            None if HUB_ID.fullmatch(choices.geneval_detector or "") else choices.geneval_detector
        ),
        "--geneval-metadata": None if on_hub else metadata,
    }
    for option, path in given.items():
        if path is None:
            continue
        check_no_address(str(path))
        if not at_home(path).exists():
            hub = "" if option in ("--reference", "--inception-weights") else ", nor OWNER/NAME on the hub"
            raise SprintError(f"{option} {path}: no such file or folder{hub}")
