"""Where recipes lie: at a path, in ./recipes, or inside the package. Nothing heavy is imported here."""

from pathlib import Path

import yaml

from sprint.base.door import read_text, regular_file, shown
from sprint.base.errors import SprintError
from sprint.recipe.schema import Data
from sprint.recipe.text import NOT_A_VALUE, look_over

RECIPE_BYTES = 2**16  # of a recipe: the whole one, with every default, has 4,000
SUFFIX = ".yaml"
OWN = Path("recipes")  # of whoever runs the command; found before a built-in one of the same name
SHIPPED = Path(__file__).parent / "shipped"  # in the repository a link to its recipes/


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path as it is, else NAME.yaml in ./recipes, else the built-in one.

    Raises SprintError that says where it looked.
    """
    own = OWN / (name if str(name).endswith(SUFFIX) else f"{name}{SUFFIX}")
    for file in (Path(name), own):
        try:
            if file.exists() and not file.is_dir():
                return _checked(file)
        except (OSError, ValueError) as error:  # too long, behind a folder that is closed, or a NUL in it
            why = getattr(error, "strerror", None) or error
            raise SprintError(f"{shown(name, 200)}: no such recipe: {why}") from error
    if str(name) in names_in(SHIPPED):
        return SHIPPED / f"{name}.yaml"
    if Path(name).is_dir():
        run = Path(name) / "recipe.yaml"
        hint = (
            f"the recipe of that run is {shown(run)}"
            if run.is_file()
            else f"a model is named by teacher={name}"
        )
        raise SprintError(f"{shown(name, 200)}: no such recipe: it is a folder; {hint}")
    there = ", ".join(sorted({*names_in(SHIPPED), *names_in(OWN)}))
    raise SprintError(
        f"{shown(name, 200)}: no such recipe (looked for {Path(name)} and {own}; there are {there}); "
        f"`sprint recipes 0.6b > mine{SUFFIX}` makes one to edit"
    )


def _checked(file: Path) -> Path:
    """Raises SprintError for what is no recipe by its kind or size."""
    try:
        return regular_file(file, RECIPE_BYTES)
    except SprintError as error:
        raise SprintError(f"{error}; a model is named by teacher=, pictures by data.path=") from error


def names_in(folder: Path) -> list[str]:
    """Of the recipes in a folder, in order; none where there is no such folder."""
    return sorted(file.stem for file in folder.glob("*.yaml") if file.is_file())


def known_recipes() -> dict[str, Path]:
    """Every recipe that goes by its name alone here, and its file."""
    return {name: find_recipe(name) for name in sorted({*names_in(SHIPPED), *names_in(OWN)})}


def place_of(file: Path) -> str:
    """A recipe's file as errors name it: a built-in one by its name, since its path tells a person nothing."""
    return f"built-in recipe {file.stem}" if file.parent == SHIPPED else str(file)


def summary(file: Path) -> tuple[int, str]:
    """(pixels a side, its first comment or what it needs) of a recipe's file, which need not be valid."""
    try:
        text = read_text(file, RECIPE_BYTES)
        look_over(text, place_of(file))
        content = yaml.safe_load(text)
    except (SprintError, yaml.YAMLError, *NOT_A_VALUE) as error:
        return Data().size, f"cannot be read: {shown(error)}"
    content = content if isinstance(content, dict) else {}
    data = content.get("data")
    size = data.get("size", Data().size) if isinstance(data, dict) else Data().size
    first = text.partition("\n")[0]
    what = first.lstrip("# ") if first.startswith("#") else str(content.get("needs", ""))
    return size, what.rstrip(".")
