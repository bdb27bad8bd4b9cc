"""The model card of a folder that was exported."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from sprint.base.files import write_whole
from sprint.models.families import family_of_pipeline
from sprint.models.teacher import Teacher
from sprint.weights.folder import INDEX_FILE, read_json
from sprint.weights.settings import Settings, read_settings
from sprint.weights.sources import TRIGFLOW_FILE

CARD_FILE = "README.md"
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
    spread: str  # what another run would change of them, in words


def write_card(folder: Path, facts: Facts, name: str = "") -> Path:
    """Write an exported folder's model card, or write it anew once the scores are known.  -> README.md

    name   what the card calls the model; else the folder's own
    """
    folder, name = Path(folder), name or Path(folder).absolute().name
    kind = read_json(folder / INDEX_FILE)["_class_name"]
    family = family_of_pipeline(kind)
    card = student_card if kind == family.student_pipeline_class else teacher_card
    return write_whole(folder / CARD_FILE, card(family, name, read_settings(str(folder)), facts))


def student_card(family: Teacher, name: str, settings: Settings, facts: Facts) -> str:
    """Markdown for the Hugging Face hub; its Python runs as it stands, beside the folder `name`."""
    size, prompt = settings.size, facts.get("prompt", EXAMPLE_PROMPT)
    usage = family.student_usage(name, size, settings.max_length, settings.instruction, prompt)
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [sana-sprint, distillation]
---

# {name}: pictures in 1 to 4 steps

{_origin(facts)}A {family.title} network distilled after SANA-Sprint ([arXiv 2503.09641](https://arxiv.org/abs/2503.09641)).
{size}×{size} pixels. Guidance is embedded: a step is one forward of the network.

{_score_table(facts)}## Sample with sprint

```bash
sprint sample {name} --prompt {shlex.quote(prompt)} --steps 2 --seed 0
```

{usage}{step_lists(family, {len(times) - 1: times for times in settings.times})}"""


def show_times(times: Sequence[float]) -> str:
    """As `sprint sample --times` takes them."""
    return ",".join(f"{time:.4f}".rstrip("0").rstrip(".") for time in times)


def step_lists(family: Teacher, own: Mapping[int, Sequence[float]]) -> str:
    """Markdown for the end of a student's model card; nothing without own lists."""
    if not own:
        return ""
    lists = "".join(f"- {steps} steps: `{show_times(own[steps])}`\n" for steps in sorted(own))
    return f"""
{STEP_LISTS}
This student's own TrigFlow times, which `sprint sample` and everything that draws with sprint use in place of the
default ones of the code above:

{lists}{family.times_usage(own[max(own)])}"""


def teacher_card(family: Teacher, name: str, settings: Settings, facts: Facts) -> str:
    """Markdown, as `student_card`."""
    prompt = shlex.quote(facts.get("prompt", EXAMPLE_PROMPT))
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
---

# {name}: a flow-matching teacher

{_origin(facts)}{settings.size}×{settings.size} pixels. {family.teacher_usage()}
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
    spread = f"{facts['spread']}\n\n" if facts.get("spread") else ""
    return f"## Scores\n\n{table}\n\n{spread}"
