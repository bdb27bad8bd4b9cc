"""Which models an evaluation looks at: their role, their steps, their names, and the hash that tells them apart."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sprint.base.door import at_home, read_text
from sprint.base.errors import SprintError
from sprint.base.names import BUILT_IN, resolve
from sprint.evaluate.published import published_size
from sprint.lab.scenes import SIZE as SCENE_SIZE
from sprint.recipe.find import RECIPE_BYTES
from sprint.recipe.rules import out_of_range
from sprint.recipe.schema import Evaluate
from sprint.recipe.text import NOT_A_VALUE, look_over
from sprint.weights.checkpoint import understand
from sprint.weights.folder import student_of
from sprint.weights.load import understand_teacher
from sprint.weights.settings import STUDENT_STEPS, settings_of

STUDENT, TEACHER = "student", "teacher"  # roles, and folders of a run
UNDISTILLED = "undistilled"  # role of a run's teacher that is asked for one step, as its student is
STUDENT_DEFAULT, TEACHER_DEFAULT = (1, 2, 4), (20,)  # steps
EVALUATIONS = Path("evaluations")  # where results lie
OF_A_RUN = "evaluation"  # and those of a run, in its folder
OWN_PROMPTS = (
    "prompts.txt"  # in the folder of a run on other data than scenes: a caption a line, to draw with
)


@dataclass(frozen=True)
class Model:
    """One set of weights.

    size     pixels a side where its sprint.json tells
    spared   which of `steps` show what a student is spared: their role is `UNDISTILLED`
    paper    the size of Sana-Sprint that it has, as `published` takes it; None for others
    family   where its text encoder and autoencoder are, if not with it
    called   tells it from another one of the same role; empty where there is none
    """

    path: str
    role: str
    steps: Sequence[int]
    size: int | None
    paper: str | None = None
    called: str = ""
    spared: int | None = None
    family: str | None = None

    def role_at(self, steps: int) -> str:
        return UNDISTILLED if steps == self.spared else self.role

    @property
    def small(self) -> bool:
        """Whether it draws pictures of the built-in scenes' size, which only their family does."""
        return self.size == SCENE_SIZE


def is_run(model: str) -> bool:
    """Whether it is the folder of a run that has its student."""
    return all((Path(resolve(model)) / role).is_dir() for role in (STUDENT, TEACHER))


def own_prompts(model: str) -> Path | None:
    """The captions that a run has set aside to be drawn; None where it learns the built-in scenes, or has none."""
    file = Path(resolve(model)) / OWN_PROMPTS
    return file if is_run(model) and file.is_file() else None


def find_models(
    model: str,
    teacher: str | None = None,
    steps: Sequence[int] = (),
    own: Evaluate | None = None,
    family: str | None = None,
) -> list[Model]:
    """The model, or a run's student and teacher, and the teacher to compare with.

    steps   of the model; each role has its own where there are none
    own     what a run's recipe says of its evaluation
    family  where the model's text encoder and autoencoder are, if not with it

    Raises SprintError for what cannot be drawn with, and for the same model at the same steps twice.
    """
    folder = Path(resolve(model))
    if is_run(model):
        first = _model(str(folder / STUDENT), steps or (own.steps if own else ()))
        if not teacher:
            return [first, _own_teacher(str(folder / TEACHER), own)]
    else:
        first = _model(student_of(model), steps, family)
    return _beside(first, teacher) if teacher else [first]


def _own_teacher(path: str, own: Evaluate | None) -> Model:
    """As the recipe asks for it, and in a single step beside it."""
    if own is None:
        return _model(path, ())
    return replace(_model(path, (own.teacher_steps, 1)), spared=1 if own.teacher_steps > 1 else None)


def _beside(first: Model, teacher: str) -> list[Model]:
    """The model and a teacher that was named."""
    understand_teacher(resolve(teacher))
    second = _model(teacher, ())
    if not same_place(first.path, second.path):
        return _told_apart(first, second) if first.role == second.role else [first, second]
    if twice := sorted({*first.steps} & {*second.steps}):
        raise SprintError(
            f"--teacher {teacher}: is the model itself, at {twice[0]} steps twice; leave it out"
        )
    return [first, second]


def _model(path: str, steps: Sequence[int], family: str | None = None) -> Model:
    checkpoint = understand(resolve(path))
    student = checkpoint.is_student
    steps = tuple(dict.fromkeys(steps)) or (STUDENT_DEFAULT if student else TEACHER_DEFAULT)
    for count in steps:
        if count < 1 or (student and count > STUDENT_STEPS):
            most = f"1 to {STUDENT_STEPS}" if student else "at least 1"
            raise SprintError(
                f"--steps {count}: {path} is a {'student' if student else 'teacher'} and takes {most}"
            )
    role, size = STUDENT if student else TEACHER, settings_of(resolve(path), family and resolve(family)).size
    return Model(
        path,
        role,
        steps,
        size,
        published_size(checkpoint.family.size_of(checkpoint.config)) if student else None,
        family=family,
    )


def _told_apart(*models: Model) -> list[Model]:
    names = [evaluation_name(model.path) for model in models]
    if len(set(names)) < len(names):
        names = [model.path for model in models]
    return [replace(model, called=name) for model, name in zip(models, names, strict=True)]


def same_place(one: str, other: str) -> bool:
    """Whether two names are of the same folder, or the same hub id."""
    return at_home(resolve(one)).resolve() == at_home(resolve(other)).resolve()


def evaluation_name(model: str) -> str:
    """runs/tiny -> tiny, runs/tiny/student -> tiny-student, owner/name -> name; tiny, built in -> tiny-built-in"""
    if model in BUILT_IN:
        return f"{model}-built-in"
    path = at_home(model)
    path = path.resolve() if path.exists() else path
    return f"{path.parent.name}-{path.name}" if path.name in (STUDENT, TEACHER) else path.name


def evaluation_folder(model: str) -> Path:
    """Where the result of a model lies if nobody says otherwise: a run's own in its folder."""
    return Path(resolve(model)) / OF_A_RUN if is_run(model) else EVALUATIONS / evaluation_name(model)


def own_evaluation(model: str) -> Evaluate | None:
    """What a run's recipe says of its evaluation; None for what is no run, or says nothing, or wants none."""
    if not is_run(model):
        return None
    try:
        text = recipe_of(model)
        look_over(text, f"{model}/recipe.yaml")
        given = yaml.safe_load(text)["evaluate"]
        own = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Evaluate), given))
        problem = next(out_of_range(own, "evaluate."), "")
    except (yaml.YAMLError, OmegaConfBaseException, KeyError, *NOT_A_VALUE):
        return None
    if problem:
        raise SprintError(f"{model}/recipe.yaml: {problem}")
    return own if own.prompts else None


def recipe_of(model: str) -> str:
    """YAML of the run that the model came from, or "" without one. Raises SprintError where it cannot be read."""
    folder = Path(resolve(model))
    for file in (folder / "recipe.yaml", folder.parent / "recipe.yaml"):
        if folder.is_dir() and file.is_file():
            try:
                return read_text(file, RECIPE_BYTES)
            except SprintError as error:
                raise SprintError(f"{error}; mend it or move it away") from error
    return ""
