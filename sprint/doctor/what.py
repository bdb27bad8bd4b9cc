"""What a name stands for: a model, a run, a recipe or a data set. Nothing is opened to find out."""

import re
from enum import Enum
from pathlib import Path

from sprint.base.door import at_home, check_no_address, shown
from sprint.base.errors import SprintError
from sprint.base.names import BUILT_IN
from sprint.data.walk import SINGLE
from sprint.evaluate.models import STUDENT
from sprint.recipe.find import OWN, known_recipes
from sprint.recipe.kinds import ARCHIVES
from sprint.train.log import METRICS
from sprint.weights.locate import WEIGHTS
from sprint.weights.sources import HUB_ID


class Kind(str, Enum):
    model = "model"
    run = "run"
    recipe = "recipe"
    data = "data"


OF_A_RUN = ("recipe.hash", METRICS)
OF_A_MODEL = ("model_index.json", "transformer", "config.json", "checkpoints")
BRACES = re.compile(r"\{.+\}|\*")  # of shards
INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")  # of shards
TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".json", ".parquet", ".txt", *ARCHIVES, *SINGLE)


def kind_of(name: str, kind: Kind | None = None) -> Kind:
    """kind   as an option says

    A built-in name such as "tiny" is a recipe's and a model's: the recipe is meant, since it names the model.
    Raises SprintError where nothing has that name, or nobody could tell.
    """
    if kind:
        return kind
    if name in known_recipes() or (OWN / f"{name}.yaml").is_file():
        return Kind.recipe
    check_no_address(name)
    path = at_home(name)
    try:
        there, folder = path.exists(), path.is_dir()
    except OSError as error:
        raise SprintError(f"{shown(name)}: {error.strerror}") from error
    if not there:
        if name.endswith(".tar") and BRACES.search(name):
            return Kind.data
        if name in BUILT_IN or HUB_ID.fullmatch(name):
            return Kind.model
        raise SprintError(
            f"{shown(name)}: no model, run, recipe or data of that name; give a path, a hub id, a recipe's name"
        )
    found = _of_folder(path) if folder else _of_file(path)
    if found is None:
        raise SprintError(
            f"{shown(name)}: a model, a run, a recipe or data? Say which: --kind {'|'.join(one.value for one in Kind)}"
        )
    return found


def _of_file(path: Path) -> Kind | None:
    name = path.name.lower()
    if name.endswith((".yaml", ".yml")):
        return Kind.recipe
    if name.endswith(WEIGHTS) or INDEX.search(name):
        return Kind.model
    return Kind.data if name.endswith(TABLES) else None


def _of_folder(path: Path) -> Kind | None:
    if any((path / name).is_file() for name in OF_A_RUN) or (path / STUDENT / "transformer").is_dir():
        return Kind.run
    files = [file for file in path.iterdir() if not file.name.startswith(".")]
    model = any((path / name).exists() for name in OF_A_MODEL)
    weights = any(file.name.endswith(WEIGHTS) for file in files)
    if model or weights:
        return Kind.model
    return Kind.data if files else None
