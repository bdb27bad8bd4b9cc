"""Which models an evaluation looks at: their role, their steps, their names, and the hash that tells them apart."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sprint.base.errors import SprintError
from sprint.base.names import BUILT_IN, resolve
from sprint.evaluate.published import published_size
from sprint.lab.scenes import SIZE as SCENE_SIZE
from sprint.weights.checkpoint import understand
from sprint.weights.load import understand_teacher
from sprint.weights.settings import STUDENT_STEPS, read_settings

STUDENT, TEACHER = "student", "teacher"
STUDENT_DEFAULT, TEACHER_DEFAULT = (1, 2, 4), (20,)  # steps


@dataclass(frozen=True)
class Model:
    """One set of weights.

    size     pixels a side where its sprint.json tells
    paper    the size of Sana-Sprint that it has, as `published` takes it; None for others
    called   tells it from another one of the same role; empty where there is none
    """

    path: str
    role: str
    steps: Sequence[int]
    size: int | None
    paper: str | None = None
    called: str = ""

    @property
    def small(self) -> bool:
        """Whether it draws pictures of the built-in scenes' size, which only their family does."""
        return self.size == SCENE_SIZE


def find_models(model: str, teacher: str | None = None, steps: Sequence[int] = ()) -> list[Model]:
    """The model, or a run's student and teacher, and the teacher to compare with.

    steps   of the model; each role has its own where there are none

    Raises SprintError for what cannot be drawn with, and for the same model at the same steps twice.
    """
    folder = Path(resolve(model))
    run = all((folder / role).is_dir() for role in (STUDENT, TEACHER))
    if not run and (folder / "recipe.yaml").is_file():
        raise SprintError(f"{folder}: a run that has no student yet; `sprint distill` it to the end")
    first = _model(str(folder / STUDENT) if run else model, steps)
    path = teacher or (str(folder / TEACHER) if run else None)
    if not path:
        return [first]
    understand_teacher(resolve(path))
    second = _model(path, ())
    if not same_place(first.path, second.path):
        return _told_apart(first, second) if first.role == second.role else [first, second]
    if twice := sorted({*first.steps} & {*second.steps}):
        raise SprintError(f"--teacher {path}: is the model itself, at {twice[0]} steps twice; leave it out")
    return [first, second]


def _model(path: str, steps: Sequence[int]) -> Model:
    checkpoint = understand(resolve(path))
    student = checkpoint.is_student
    steps = tuple(dict.fromkeys(steps)) or (STUDENT_DEFAULT if student else TEACHER_DEFAULT)
    for count in steps:
        if count < 1 or (student and count > STUDENT_STEPS):
            most = f"1 to {STUDENT_STEPS}" if student else "at least 1"
            raise SprintError(
                f"--steps {count}: {path} is a {'student' if student else 'teacher'} and takes {most}"
            )
    role, size = STUDENT if student else TEACHER, read_settings(resolve(path)).size
    return Model(
        path,
        role,
        steps,
        size,
        published_size(checkpoint.family.size_of(checkpoint.config)) if student else None,
    )


def _told_apart(*models: Model) -> list[Model]:
    names = [evaluation_name(model.path) for model in models]
    if len(set(names)) < len(names):
        names = [model.path for model in models]
    return [replace(model, called=name) for model, name in zip(models, names, strict=True)]


def same_place(one: str, other: str) -> bool:
    """Whether two names are of the same folder, or the same hub id."""
    return Path(resolve(one)).expanduser().resolve() == Path(resolve(other)).expanduser().resolve()


def evaluation_name(model: str) -> str:
    """runs/tiny -> tiny, runs/tiny/student -> tiny-student, owner/name -> name; tiny, built in -> tiny-built-in"""
    if model in BUILT_IN:
        return f"{model}-built-in"
    path = Path(model).expanduser()
    path = path.resolve() if path.exists() else path
    return f"{path.parent.name}-{path.name}" if path.name in (STUDENT, TEACHER) else path.name


def recipe_of(model: str) -> str:
    """YAML of the run that the model came from, or "" without one. Raises SprintError where it cannot be read."""
    folder = Path(resolve(model))
    for file in (folder / "recipe.yaml", folder.parent / "recipe.yaml"):
        if folder.is_dir() and file.is_file():
            try:
                return file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise SprintError(f"{file}: cannot be read as UTF-8 text; mend it or move it away") from error
    return ""
