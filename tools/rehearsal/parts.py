"""What a rehearsal does, in order: every part is a command of its own, as a person would type it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sprint.base.errors import SprintError
from sprint.recipe.find import SHIPPED, find_recipe
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Precision, Recipe
from tools.rehearsal.family import PICTURES, TEACHER

CACHE, DRAWN = "cache", "drawn"
SMALL = {  # what is done of each thing: once
    "adapt.steps": "1",
    "adapt.batch_size": "4",
    "distill.steps": "2",
    "distill.batch_size": "4",
    "evaluate.prompts": "0",
}
OWN = ("name", "teacher", "teacher_family", "data.kind", "data.path")  # keys that a rehearsal sets itself


@dataclass(frozen=True)
class Part:
    """name       short, for the table
    what          in words
    arguments     of the interpreter
    """

    name: str
    what: str
    arguments: tuple[str, ...]

    @property
    def typed(self) -> str:
        """As a person types it, in the rehearsal's folder."""
        module, *rest = self.arguments[1:]
        return shlex.join(["sprint", *rest] if module == "sprint" else ["python", "-m", module, *rest])


@dataclass(frozen=True)
class Rehearsal:
    """A recipe to rehearse.

    name        of the recipe for the commands: a built-in one's, or a file
    real        as it is, with the sizes of the rehearsal: its teacher says how large the random one is
    recipe      as it is rehearsed
    """

    name: str
    real: Recipe
    recipe: Recipe
    overrides: tuple[str, ...]

    @classmethod
    def of(cls, name: str, overrides: Sequence[str] = ()) -> "Rehearsal":
        """overrides: of the recipe, on top of what a rehearsal sets. Raises SprintError."""
        given = {override.partition("=")[0] for override in overrides}
        for key in OWN:
            if key in given:
                raise SprintError(f"{key}: a rehearsal sets this key itself; leave it out")
        file = find_recipe(name)
        built_in = file.resolve() == (SHIPPED / f"{name}.yaml").resolve()
        small = [f"{key}={value}" for key, value in SMALL.items() if key not in given] + [*overrides]
        real = load_recipe(file, [*small, "data.kind=folder", f"data.path={PICTURES}"])
        own = [f"name=random-{real.name}", f"teacher={TEACHER}"]
        own += ["teacher_family="] if real.teacher_family else []
        settings = (*own, *small)
        recipe = load_recipe(file, [*settings, "data.kind=cache", f"data.path={CACHE}"])
        return cls(name if built_in else str(file.resolve()), real, recipe, settings)

    @property
    def run(self) -> Path:
        """The run's folder."""
        return Path("runs") / self.recipe.name

    def parts(self) -> list[Part]:
        text, pictures = self.recipe.text, ("data.kind=folder", f"data.path={PICTURES}")
        cached = (*self.overrides, "data.kind=cache", f"data.path={CACHE}")
        sprint = ("-m", "sprint")
        drawing = [str(self.run / "student"), DRAWN]
        drawing += ["--size", str(self.recipe.data.size), "--max-length", str(text.max_length)]
        drawing += [] if text.instruction else ["--bare"]
        drawing += [] if self.recipe.precision is Precision.bf16 else ["--dtype", "float32"]
        small = tuple(o for o in self.overrides if o.partition("=")[0] not in OWN)
        return [
            Part(
                "make",
                "a random teacher and its encoders, captioned pictures",
                ("-m", "tools.rehearsal.family", self.name, ".", *small, *pictures),
            ),
            Part(
                "plan", "the libraries, and the plan", (*sprint, "distill", self.name, *cached, "--dry-run")
            ),
            Part(
                "cache",
                "pictures and captions encoded",
                (*sprint, "cache", self.name, *self.overrides, *pictures, "-o", CACHE),
            ),
            Part("distill", "both stages, each exported", (*sprint, "distill", self.name, *cached)),
            Part(
                "open",
                "the student drawn by diffusers alone, at 1, 2 and 4 steps",
                ("-m", "tools.rehearsal.plain", *drawing),
            ),
        ]
