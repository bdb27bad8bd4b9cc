"""The model card of a folder that was exported."""

import html
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from sprint.base.door import shown
from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.models.families import family_of_pipeline
from sprint.models.teacher import Teacher
from sprint.weights.folder import pipeline_class
from sprint.weights.settings import Settings, read_settings
from sprint.weights.sources import TRIGFLOW_FILE

CARD_FILE = "README.md"
CARD_TEXT = 2000  # characters of a name, a path or a prompt
MARKUP = re.compile(r"([\\`*_{}\[\]|~])")
EXAMPLE_PROMPT = "a red circle"
STEP_LISTS = "## Step lists\n"  # the last heading of a student's card, where it has lists of its own


class Facts(TypedDict, total=False):
    """What the model card and sprint.json tell beyond the weights; everything may be left out."""

    recipe: str  # its name
    teacher: str
    depth: str  # of a student that is deeper: "8 blocks, its teacher 4"
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
    kind = pipeline_class(folder)
    if (family := family_of_pipeline(kind)) is None:
        raise SprintError(f"{folder}: model_index.json says {shown(kind)}, a pipeline of no family here")
    card = student_card if kind == family.student_pipeline_class else teacher_card
    content = card(family, one_line(name), read_settings(str(folder)), _one_line_each(facts))
    return write_whole(folder / CARD_FILE, content)


def one_line(text: str) -> str:
    """Foreign text for a card's code: no line ends, no control characters, nothing that ends the block of code."""
    return shown(text, CARD_TEXT).replace("```", "` ` `")


def escaped(text: str) -> str:
    """Foreign text for a card's prose: what Markdown or HTML would obey shows as itself."""
    return MARKUP.sub(r"\\\1", html.escape(one_line(text), quote=False))


def _one_line_each(facts: Facts) -> Facts:
    return {key: one_line(value) if isinstance(value, str) else value for key, value in facts.items()}


def student_card(family: Teacher, name: str, settings: Settings, facts: Facts) -> str:
    """Markdown for the Hugging Face hub; its Python runs as it stands, beside the folder `name`."""
    size, prompt = settings.size, facts.get("prompt", EXAMPLE_PROMPT)
    usage = family.student_usage(name, size, settings.max_length, settings.instruction, prompt)
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [sana-sprint, distillation]
---

# {escaped(name)}: pictures in 1 to 4 steps

{_origin(facts)}A {family.title} network distilled after SANA-Sprint ([arXiv 2503.09641](https://arxiv.org/abs/2503.09641)).
{size}×{size} pixels. Guidance is embedded: a step is one forward of the network.

{_score_table(facts)}## Sample with sprint

```bash
sprint sample {shlex.quote(name)} --prompt {shlex.quote(prompt)} --steps 2 --seed 0
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

# {escaped(name)}: a flow-matching teacher

{_origin(facts)}{settings.size}×{settings.size} pixels. {family.teacher_usage()}
The clock of its time embedder is in `transformer/{TRIGFLOW_FILE}`.

{_score_table(facts)}## Sample

```bash
sprint sample {shlex.quote(name)} --prompt {prompt} --steps 20 --seed 0
```
"""


def _origin(facts: Facts) -> str:
    told = [
        (key.capitalize(), facts[key]) for key in ("recipe", "teacher", "depth", "data") if facts.get(key)
    ]
    return "".join(f"- {key}: {escaped(value)}\n" for key, value in told) + "\n" * bool(told)


def _score_table(facts: Facts) -> str:
    """Rows by model, columns by score; a missing number is a dash."""
    rows = facts.get("scores", {})
    if not rows:
        return ""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["model", *map(escaped, columns)], ["---", *["---:"] * len(columns)]]
    for label, row in rows.items():
        lines.append(
            [escaped(label), *(f"{row[column]:.3g}" if column in row else "–" for column in columns)]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    spread = f"{facts['spread']}\n\n" if facts.get("spread") else ""
    return f"## Scores\n\n{table}\n\n{spread}"
