"""What `ablations.py` has to do: a job for every run, named by its recipe's hash, and whether it is done."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import yaml

from sprint.base.errors import SprintError
from sprint.base.files import sha256
from sprint.base.names import resolve
from sprint.lab.reader import RULES
from sprint.recipe.load import load_recipe, recipe_text
from sprint.recipe.schema import Recipe
from sprint.train.log import METRICS, read_metrics
from sprint.train.turns import GENERATOR, turn
from tools.ablations.rows import Group, Row

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path("runs") / "ablations"
RESULT = "result.json"
INTERRUPTED = 130  # exit code
QUICK = ("distill.steps=160", "evaluate.prompts=60")
BESIDE_THE_POINT = ("name", "needs", "save_every", "log_every")  # of a recipe: the result is the same
CACHED = "ablations"  # the recipe that reads a cache, which the list makes
OF_THE_LIST = ("name", "seed", "data.path")  # keys that the list sets itself


@dataclass(frozen=True)
class Job:
    """A run, or the stage 1 that several share.

    key       its folder's name
    teacher   key of the job whose teacher it distils; "" where it has a stage 1 of its own
    kind      "teacher" (stage 1), "student" (stage 2), or "sparse" (both, with sparse time)
    points    steps of stage 2 after which its student is scored too
    """

    key: str
    recipe: Recipe
    kind: str
    teacher: str = ""
    points: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        adapt, distill = self.recipe.adapt.steps, self.recipe.distill.steps
        return {"teacher": adapt, "student": distill, "sparse": adapt + distill}[self.kind]


@dataclass(frozen=True)
class Settings:
    """What the whole list is run with. overrides come after those of --quick and before a row's."""

    quick: bool = False
    overrides: tuple[str, ...] = ()
    root: Path = RUNS

    def __post_init__(self):
        """Raises SprintError for keys that are not to be given."""
        for override in self.overrides:
            key = override.partition("=")[0]
            if key in OF_THE_LIST:
                raise SprintError(f"{override}: the list sets {key} itself; leave it out")

    @property
    def shared(self) -> tuple[str, ...]:
        return (*(QUICK if self.quick else ()), *self.overrides)

    @cached_property
    def cache_samples(self) -> int:
        """As many as the longest of the two stages takes; --quick shares them."""
        recipe = load_recipe(recipe_file(CACHED), self.overrides)
        stages = (recipe.adapt, recipe.distill)
        return max(stage.steps * stage.batch_size for stage in stages)

    @cached_property
    def cache_folder(self) -> Path:
        """Named by its samples, and a digest of the teacher's files, text and data that it is made of."""
        recipe = load_recipe(recipe_file(CACHED), self.overrides)
        facts = {key: asdict(recipe)[key] for key in ("teacher", "teacher_family", "text", "data")}
        made_of = facts | {"files": weights_digest(recipe.teacher)}
        return self.root / f"cache-{self.cache_samples}-{_sha256(made_of)[:8]}"

    def seeds(self, row: Row) -> range:
        return range(1 if self.quick else row.seeds)

    def student(self, row: Row, seed: int) -> Job:
        overrides = (*self.shared, *self._cached(row), *row.overrides)
        kind, teacher = ("sparse", "") if row.sparse else ("student", self.teacher(row).key)
        return _job(kind, row, overrides, seed, teacher)

    def teacher(self, row: Row) -> Job:
        """Stage 1 of a row, of seed 0 for all seeds; what concerns stage 2 and --quick does not change it, nor how a
        row is scored."""
        mine = [o for o in self.overrides if not o.startswith("distill.")]
        mine += [o for o in row.overrides if not o.startswith(("distill.", "evaluate."))]
        return _job("teacher", Row("", recipe=row.recipe), (*self._cached(row), *mine))

    def _cached(self, row: Row) -> tuple[str, ...]:
        return (f"data.path={self.cache_folder}",) if row.recipe == CACHED else ()


def recipe_file(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.yaml"


@cache
def weights_digest(teacher: str) -> str:
    """Of every file of a teacher's folder, eight hex digits: what another teacher of the same name taught is another
    run. "" where it is no folder here."""
    folder = Path(resolve(teacher))
    files = sorted(file for file in folder.rglob("*.safetensors")) if folder.is_dir() else []
    return _sha256({str(file.relative_to(folder)): sha256(file) for file in files})[:8] if files else ""


_read = cache(load_recipe)  # which takes a tenth of a second


@cache
def _job(kind: str, row: Row, overrides: tuple[str, ...], seed: int = 0, teacher: str = "") -> Job:
    recipe = replace(_read(recipe_file(row.recipe), overrides), seed=seed)
    steps = round(recipe.distill.steps * row.updates)
    distill = replace(recipe.distill, steps=steps)
    if row.warmup:
        updates = sum(turn(step, distill) == GENERATOR for step in range(steps))
        warmed = replace(distill.adversarial, warmup_steps=round(row.warmup * updates))
        distill = replace(distill, adversarial=warmed)
    recipe = replace(recipe, distill=distill, log_every=1)  # thread-seconds are told update by update
    prefix, suffix = ("teacher-" if kind == "teacher" else ""), ("-sparse" if kind == "sparse" else "")
    key = prefix + digest(recipe) + suffix
    points = sorted({max(1, round(steps * share)) for share in row.points} - {steps})
    return Job(key, replace(recipe, name=key), kind, teacher, tuple(points))


def digest(recipe: Recipe) -> str:
    """Twelve hex digits of what differs from a recipe's defaults, but for names and the rhythm of the log, and of the
    teacher's weights.

    Unlike `recipe_hash` it stays when recipes gain a field: finished runs count on.
    """
    plain = dict(_leaves(asdict(type(recipe)())))
    settings = {key: value for key, value in _leaves(asdict(recipe)) if key not in BESIDE_THE_POINT}
    changed = {key: value for key, value in settings.items() if value != plain[key]}
    return _sha256(changed | {"weights": weights_digest(recipe.teacher)})[:12]


def _sha256(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _leaves(settings: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys and values."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def plan(groups: Sequence[Group], settings: Settings) -> dict[str, Job]:
    """Every job once, by key: stages 1 first, then first seeds of all rows, then the second ones."""
    rows = [row for group in groups for row in group.rows]
    teachers = [settings.teacher(row) for row in rows if not row.sparse]
    students = [
        settings.student(row, seed)
        for seed in range(max((row.seeds for row in rows), default=0))
        for row in rows
        if seed in settings.seeds(row)
    ]
    return {job.key: job for job in (*teachers, *students)}


def is_done(job: Job, root: Path) -> bool:
    """Whether its result is there, of these settings, and of this reader and feature network where it has scores."""
    file = root / job.key / RESULT
    if not file.exists() or other_settings(job, file.parent):
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    network, rules = found.get("network"), found.get("reader")
    return not found.get("scores") or (rules == RULES and network in (None, feature_network()))


def other_settings(job: Job, folder: Path) -> list[str]:
    """Keys that the run in `folder` has and the job too, with other values: a default changed since, which
    `digest` cannot see. Empty where there is no run."""
    file = folder / "recipe.yaml"
    if not file.exists():
        return []
    before, now = (
        dict(_leaves(yaml.safe_load(text)))
        for text in (file.read_text(encoding="utf-8"), recipe_text(job.recipe))
    )
    both = (key for key in now if key in before and key.partition(".")[0] not in BESIDE_THE_POINT)
    return [key for key in both if before[key] != now[key]]


@cache
def feature_network() -> str:
    """Name of the network that FID is measured with."""
    from sprint.lab.features import scene_features

    return scene_features().name


def steps_done(job: Job, root: Path) -> int:
    """As its log says."""
    rows = read_metrics(root / job.key / METRICS)
    last = {row["stage"]: row["step"] for row in rows}
    return min(job.steps, sum(last.values()))
