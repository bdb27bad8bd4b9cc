"""sprint.json: what a diffusers folder has no place for."""

from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import ConfigDict, Field, Strict
from typing_extensions import TypedDict

from sprint.base.door import held_against, read_as
from sprint.base.errors import SprintError
from sprint.maths.schedule import check_times
from sprint.weights.hub import HubError, NoSuchFile, fetch_file

SETTINGS_FILE = "sprint.json"  # in the folder's root: what a diffusers pipeline has no place for
STUDENT_STEPS = 4  # most steps with a default list of times


class Settings(NamedTuple):
    """How prompts were read and pictures sized in training; the defaults are those of public Sana models.

    times   lists that take the place of a student's default ones, at most one for a number of steps
    """

    max_length: int = 300
    instruction: bool = True
    size: int | None = None
    times: tuple[tuple[float, ...], ...] = ()


Whole = Annotated[int, Strict(), Field(ge=1, le=2**20)]

Times = Annotated[list[Annotated[float, Strict()]], Field(max_length=100)]


class _Text(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="forbid")  # read by pydantic

    max_length: Whole
    instruction: Annotated[bool, Strict()]


class _File(TypedDict, total=False):
    """sprint.json; what else it says is for people."""

    text: dict
    size: Whole | None
    times: Annotated[list[Times], Field(max_length=100)]


def settings_of(name: str, family: str | None) -> Settings:
    """Of a folder or hub id; where it has none, those of the one whose text encoder it borrows, less its step lists."""
    own = read_settings(name)
    return own if family is None or own != Settings() else read_settings(family)._replace(times=())


def read_settings(name: str) -> Settings:
    """The settings of a folder or hub id, from its sprint.json; defaults where it has none."""
    file = Path(name) / SETTINGS_FILE if Path(name).exists() else _settings_on_hub(name)
    if file is None or not file.is_file():
        return Settings()
    content = read_as(_File, file)
    text = held_against(_Text, content.get("text", {}), file)
    try:
        times = tuple(tuple(check_times(list(times))) for times in content.get("times", []))
    except SprintError as error:
        raise SprintError(f"{file}: {error}") from error
    settings = Settings(**text, size=content.get("size"), times=times)
    steps = [len(times) - 1 for times in settings.times]
    if len(set(steps)) < len(steps) or max(steps, default=1) > STUDENT_STEPS:
        raise SprintError(
            f"{file}: times: give one list at most for each number of steps, 1 to {STUDENT_STEPS}"
        )
    return settings


def _settings_on_hub(repo_id: str) -> Path | None:
    try:
        return fetch_file(repo_id, SETTINGS_FILE)
    except NoSuchFile:
        return None
    except HubError as error:
        raise SprintError(f"{repo_id}: the hub did not answer for {SETTINGS_FILE}: {error}") from error
