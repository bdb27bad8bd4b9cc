"""Folders that diffusers opens: a student as `SanaSprintPipeline`, an adapted teacher as `SanaPipeline`.

DIR/model_index.json, scheduler, tokenizer, text_encoder, vae   as diffusers writes them
DIR/transformer   the network, trigflow.json (its clock), logvar.safetensors (a student's loss weighting)
DIR/sprint.json   text settings and picture size, which `sprint sample` reads
DIR/README.md     the model card
"""

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from sprint.base.errors import SprintError
from sprint.base.files import flush_folder, flush_tree, write_whole
from sprint.maths.trigflow import SIGMA_DATA
from sprint.models.encoders import Family
from sprint.models.view import DENSE_TIME, SPARSE_TIME
from sprint.sample.generate import SETTINGS_FILE, Settings, read_settings
from sprint.weights.checkpoint import understand
from sprint.weights.load import build_network
from sprint.weights.sources import SIDE_FILES, TRIGFLOW_FILE

LOGVAR_FILE = SIDE_FILES[1]
LOGVAR_KEYS = {"weight": "logvar_linear.weight", "bias": "logvar_linear.bias"}  # Sana-Sprint's own names
INDEX_FILE = "model_index.json"
CARD_FILE = "README.md"
SANA_SHIFT = 3.0  # of the flow times that Sana's sampler walks
EXAMPLE_PROMPT = "a red circle"
STEP_LISTS = "## Step lists\n"  # the last heading of a student's card, where it has lists of its own


class Facts(TypedDict, total=False):
    """What the model card and sprint.json tell beyond the weights; everything may be left out."""

    recipe: str  # its name
    teacher: str
    data: str
    prompt: str  # an example for the card
    times: Sequence[Sequence[float]]  # a student's own step lists, at most one for a number of steps
    scores: dict[str, dict[str, float]]  # row ("student, 1 step") -> column ("scene score") -> number


# ---- the two exports ----------------------------------------------------------------------------------


def export_student(
    folder: Path, network: SanaTransformer2DModel, logvar: nn.Linear | None, family: Family, facts: Facts
) -> Path:
    """Write a student as a folder that `SanaSprintPipeline.from_pretrained` opens offline.  -> folder

    network   embeds guidance and has dense time; weights are written in the dtype they have
    logvar    Linear(width, 1) of the adaptive loss weighting, for training on; None leaves it out

    Whole or not at all: an earlier export gives way only to a complete one. Raises SprintError for a network
    without guidance, a folder of something else, and a full or read-only disk.
    """
    if not network.config.guidance_embeds:
        raise SprintError(f"{folder}: a student embeds guidance and this network does not; export a teacher")
    parts = family.tokenizer, family.text_encoder, family.autoencoder, network
    with complete_or_absent(Path(folder)) as place:
        _save_pipeline(SanaSprintPipeline(*parts, SCMScheduler(sigma_data=SIGMA_DATA)), place)
        if logvar is not None:
            head = {name: getattr(logvar, part).detach().contiguous() for part, name in LOGVAR_KEYS.items()}
            save_file(head, place / "transformer" / LOGVAR_FILE, {"format": "pt"})
        _write_about(place, network, family, facts)
        _write_card(place, _name(folder), facts)
    return Path(folder)


def export_teacher(folder: Path, network: SanaTransformer2DModel, family: Family, facts: Facts) -> Path:
    """Write an adapted teacher as a folder that `SanaPipeline.from_pretrained` opens offline.  -> folder

    network   embeds no guidance and has dense time, which is also written as diffusers' `timestep_scale`, so
              that `SanaPipeline` itself keeps the clock

    Otherwise as `export_student`.
    """
    if network.config.guidance_embeds:
        raise SprintError(f"{folder}: this network embeds guidance, as students do; a teacher does not")
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=SANA_SHIFT
    )
    parts = family.tokenizer, family.text_encoder, family.autoencoder, network
    with complete_or_absent(Path(folder)) as place:
        _save_pipeline(SanaPipeline(*parts, scheduler), place)
        config = place / "transformer" / "config.json"
        _write_json(config, _read_json(config) | {"timestep_scale": DENSE_TIME / SPARSE_TIME})
        _write_about(place, network, family, facts)
        _write_card(place, _name(folder), facts)
    return Path(folder)


def load_student(folder: str | Path) -> tuple[SanaTransformer2DModel, nn.Linear | None]:
    """Network in fp32 and eval mode, and the logvar head if the folder has one. Raises SprintError."""
    checkpoint = understand(folder)
    if not checkpoint.config["guidance_embeds"]:
        raise SprintError(f"{folder} is a teacher (it embeds no guidance); a student is needed here")
    network = build_network(checkpoint)
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()  # free of the file, which a later export may replace
    extras = dict(checkpoint.stream_extras())
    if not set(LOGVAR_KEYS.values()) <= extras.keys():
        return network, None
    logvar = nn.Linear(checkpoint.width, 1)
    logvar.load_state_dict({part: extras[name].float() for part, name in LOGVAR_KEYS.items()})
    return network, logvar


# ---- files --------------------------------------------------------------------------------------------


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder` to write into; at the end it takes the place of an earlier export.

    After an error, or Ctrl-C, `folder` is as it was. Raises SprintError for OSErrors on the way, and where
    `folder` holds anything but an earlier export.
    """
    folder = folder.absolute()
    if folder.exists() and not (folder / INDEX_FILE).is_file() and not _is_empty(folder):
        raise SprintError(f"{folder} holds something that is no exported model; give another folder")
    fresh, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed
    try:
        fresh.mkdir(parents=True)
        yield fresh
        flush_tree(fresh)
        _swap(fresh, folder, old)
        flush_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise SprintError(f"cannot write {folder}: {reason}; it is as it was") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap(fresh: Path, folder: Path, old: Path) -> None:
    """`fresh` becomes `folder`; if that fails, what was there comes back."""
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    try:
        os.replace(fresh, folder)
    except BaseException:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _name(folder: str | Path) -> str:
    return Path(folder).absolute().name


def _save_pipeline(pipeline: DiffusionPipeline, place: Path) -> None:
    """What diffusers writes, less the folders of this machine that the parts were once loaded from."""
    try:
        pipeline.save_pretrained(place)
    except Exception as error:
        if type(error) is Exception:  # how tokenizers reports a full disk
            raise OSError(str(error)) from error
        raise
    for config in place.glob("*/config.json"):
        content = _read_json(config)
        if content.pop("_name_or_path", None) is not None:
            _write_json(config, content)


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_about(place: Path, network: SanaTransformer2DModel, family: Family, facts: Facts) -> None:
    """trigflow.json, with the fields that `convert` writes, from the files just written; and sprint.json."""
    checkpoint = understand(place, DENSE_TIME)
    config = checkpoint.config
    clock = {
        "time": checkpoint.time,
        "time_scale": checkpoint.time_scale,
        "time_scale_from": "training",
        "sigma_data": SIGMA_DATA,
        "network": {
            "depth": config["num_layers"],
            "width": checkpoint.width,
            "parameters": network.num_parameters(),
            "cross_attention_heads": config["num_cross_attention_heads"],
            "qk_norm": config["qk_norm"] is not None,
            "guidance": config["guidance_embeds"],
        },
        "tensors": {"network": len(checkpoint.network), "extra": checkpoint.extras},
    }
    text = {"max_length": family.max_length, "instruction": family.instruction}
    size = config["sample_size"] * family.downscale
    settings = {"text": text, "size": size, "recipe": facts.get("recipe")}
    if facts.get("times"):
        settings["times"] = [list(times) for times in facts["times"]]
    _write_json(place / "transformer" / TRIGFLOW_FILE, clock)
    _write_json(place / SETTINGS_FILE, settings)


# ---- model cards --------------------------------------------------------------------------------------


def write_card(folder: Path, facts: Facts) -> Path:
    """Write an exported folder's model card anew, once the scores are known.  -> README.md"""
    return _write_card(Path(folder), _name(folder), facts)


def _write_card(folder: Path, name: str, facts: Facts) -> Path:
    kind = _read_json(folder / INDEX_FILE)["_class_name"]
    card = {SanaSprintPipeline.__name__: student_card, SanaPipeline.__name__: teacher_card}[kind]
    return write_whole(folder / CARD_FILE, card(name, read_settings(str(folder)), facts))


def student_card(name: str, settings: Settings, facts: Facts) -> str:
    """Markdown for the Hugging Face hub; its Python runs as it stands, beside the folder `name`."""
    size, prompt = settings.size, facts.get("prompt", EXAMPLE_PROMPT)
    lines = [
        f"height={size}, width={size}, use_resolution_binning=False,",
        f"max_sequence_length={settings.max_length},",
    ]
    if not settings.instruction:
        lines.append("complex_human_instruction=None,  # trained on bare prompts")
    arguments = "\n".join(f"    {line}" for line in lines)
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [sana-sprint, distillation]
---

# {name}: pictures in 1 to 4 steps

{_origin(facts)}A Sana network distilled after SANA-Sprint ([arXiv 2503.09641](https://arxiv.org/abs/2503.09641)).
{size}×{size} pixels. Guidance is embedded: a step is one forward of the network.

{_score_table(facts)}## Sample with sprint

```bash
sprint sample {name} --prompt {shlex.quote(prompt)} --steps 2 --seed 0
```

## Sample with diffusers

```python
import torch
from diffusers import SanaSprintPipeline

pipeline = SanaSprintPipeline.from_pretrained("{name}")
settings = dict(
    guidance_scale=4.5,
{arguments}
)
two_steps = pipeline(
    {prompt!r}, num_inference_steps=2, generator=[torch.Generator().manual_seed(0)], **settings
).images[0]
one_step = pipeline(
    {prompt!r}, num_inference_steps=1, intermediate_timesteps=None,
    generator=[torch.Generator().manual_seed(0)], **settings
).images[0]
two_steps.save("two_steps.png")
one_step.save("one_step.png")
```

`intermediate_timesteps=None` is needed for every number of steps but two. One generator a picture, seeded by
itself, gives the pictures of `sprint sample` at the default times.
{step_lists({len(times) - 1: times for times in settings.times})}"""


def show_times(times: Sequence[float]) -> str:
    """As `sprint sample --times` takes them."""
    return ",".join(f"{time:.4f}".rstrip("0").rstrip(".") for time in times)


def step_lists(own: Mapping[int, Sequence[float]]) -> str:
    """Markdown for the end of a student's model card; nothing without own lists.

    diffusers' pipeline hands its scheduler `timesteps` without their number, which that one asks for (as of
    0.42): the number is bound beforehand.
    """
    if not own:
        return ""
    lists = "".join(f"- {steps} steps: `{show_times(own[steps])}`\n" for steps in sorted(own))
    steps = max(own)
    return f"""
{STEP_LISTS}
This student's own TrigFlow times, which `sprint sample` and everything that draws with sprint use in place of the
default ones of the code above:

{lists}
diffusers takes them so, with `settings` from above:

```python
from functools import partial

pipeline.scheduler.set_timesteps = partial(pipeline.scheduler.set_timesteps, {steps})
picture = pipeline(
    "a red circle", num_inference_steps={steps}, timesteps={[round(t, 4) for t in own[steps]]},
    max_timesteps=None, intermediate_timesteps=None,
    generator=[torch.Generator().manual_seed(0)], **settings
).images[0]
```
"""


def teacher_card(name: str, settings: Settings, facts: Facts) -> str:
    """Markdown, as `student_card`."""
    prompt = shlex.quote(facts.get("prompt", EXAMPLE_PROMPT))
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
---

# {name}: a flow-matching teacher

{_origin(facts)}{settings.size}×{settings.size} pixels. Opens in `diffusers.SanaPipeline`.
The clock of its time embedder is in `transformer/{TRIGFLOW_FILE}`.

{_score_table(facts)}## Sample

```bash
sprint sample {name} --prompt {prompt} --steps 20 --seed 0
```
"""


def _origin(facts: Facts) -> str:
    told = [(key.capitalize(), facts[key]) for key in ("recipe", "teacher", "data") if facts.get(key)]
    return "".join(f"- {key}: {value}\n" for key, value in told) + "\n" * bool(told)


def _score_table(facts: Facts) -> str:
    """Rows by model, columns by score; a missing number is a dash."""
    rows = facts.get("scores", {})
    if not rows:
        return ""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["model", *columns], ["---", *["---:"] * len(columns)]]
    for label, row in rows.items():
        lines.append([label, *(f"{row[column]:.3g}" if column in row else "–" for column in columns)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## Scores\n\n{table}\n\n"
