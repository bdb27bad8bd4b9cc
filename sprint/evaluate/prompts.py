"""Which pictures to draw: sets of prompts, each picture with a seed of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sprint.base.door import at_home, check_no_address, shown
from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate.result import Shot
from sprint.lab.series import held_out_scenes

SCENES, GENEVAL, MJHQ, TEXT = "scenes", "geneval", "mjhq", "prompts"  # names of sets
SCENE_COUNT = 600  # held-out scenes, as in the report of a run
MJHQ_COUNT = 30_000


@dataclass(frozen=True)
class Prompts:
    """A set of pictures to draw. `words` say what it is, in the result."""

    name: str
    words: str
    shots: Sequence[Shot]


def spread(total: int, count: int | None) -> list[int]:
    """Indices of `count` of so many things, evenly over all, since sets are sorted by kind. All where None."""
    count = total if count is None else min(count, total)
    return [i * total // count for i in range(count)]


def scene_prompts(count: int | None, seed: int) -> Prompts:
    """The first held-out scenes; categories take turns."""
    scenes = held_out_scenes(count or SCENE_COUNT)
    shots = [Shot(s.caption, seed + i, s.claim.category) for i, s in enumerate(scenes)]
    return Prompts(SCENES, f"{len(shots)} built-in held-out scenes{_fewer(len(shots), SCENE_COUNT)}", shots)


def reference_prompts(path: Path, count: int | None, seed: int) -> Prompts:
    """Prompts of real pictures, the first `count` of them. Raises NotHereError where there are none."""
    from sprint.evaluate.metrics.real import MJHQ_PROMPTS, RealStatistics, open_reference

    pictures = open_reference(path)
    captions = [] if isinstance(pictures, RealStatistics) else [p.prompt for p in pictures if p.prompt]
    if not captions:
        what = "statistics, which have no prompts" if isinstance(pictures, RealStatistics) else "no captions"
        raise NotHereError(f"{path}: {what}; give --prompts FILE, a prompt a line")
    shots = [Shot(caption, seed + i) for i, caption in enumerate(captions[:count])]
    if (path / MJHQ_PROMPTS).is_file():
        return Prompts(MJHQ, f"{len(shots)} prompts of MJHQ-30K{_fewer(len(shots), MJHQ_COUNT)}", shots)
    return Prompts(TEXT, f"{len(shots)} of {len(captions)} captions in {path.name}", shots)


def text_prompts(file: Path, count: int | None, seed: int) -> Prompts:
    """Prompts of a file in any of the forms that data.kind = prompts takes, the first `count` of them. Raises
    SprintError for a file without prompts."""
    from sprint.data.kinds.prompts import read_prompts

    try:
        prompts, there = read_prompts(file, count)
    except SprintError as error:
        raise SprintError(f"--prompts {error}") from error
    shots = [Shot(prompt, seed + i) for i, prompt in enumerate(prompts)]
    return Prompts(TEXT, f"{len(shots)} of {there} prompts in {file.name}", shots)


def named_prompts(name: str, count: int | None, seed: int) -> Prompts:
    """What --prompts says: scenes, a folder or a file. Raises SprintError where there is no such thing."""
    if name == SCENES:
        return scene_prompts(count, seed)
    check_no_address(name)
    path = at_home(name)
    try:
        if path.is_dir():
            return reference_prompts(path, count, seed)
        there = path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        there = False
    if not there:
        raise SprintError(f"--prompts {shown(name)}: no such file or folder; or say scenes")
    return text_prompts(path, count, seed)


def no_prompts() -> NotHereError:
    return NotHereError(
        "no prompts to draw: give --reference FOLDER with MJHQ-30K "
        "(hf download playgroundai/MJHQ-30K --repo-type dataset), or --prompts FILE, a prompt a line"
    )


def needed(prompts: Prompts | NotHereError) -> Prompts:
    """The set, or raises why there is none."""
    if isinstance(prompts, NotHereError):
        raise prompts
    return prompts


def _fewer(count: int, whole: int) -> str:
    return "" if count >= whole else f", fewer than the protocol's {whole}"
