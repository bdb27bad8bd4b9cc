"""sprint.json: what a diffusers folder has no place for."""

import json
from pathlib import Path
from typing import NamedTuple

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


def read_settings(name: str) -> Settings:
    """The settings of a folder or hub id, from its sprint.json; defaults where it has none."""
    file = Path(name) / SETTINGS_FILE if Path(name).exists() else _settings_on_hub(name)
    if file is None or not file.is_file():
        return Settings()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        times = tuple(tuple(check_times(times)) for times in content.get("times", []))
        settings = Settings(**content.get("text", {}), size=content.get("size"), times=times)
    except SprintError as error:
        raise SprintError(f"{file}: {error}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SprintError(
            f'{file}: expected {{"text": {{"max_length": …, "instruction": …}}, "size": …, "times": [[…], …]}}'
        ) from error
    if [type(value) for value in settings[:3]] not in ([int, bool, int], [int, bool, type(None)]):
        raise SprintError(f"{file}: max_length and size are whole numbers, instruction is true or false")
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
