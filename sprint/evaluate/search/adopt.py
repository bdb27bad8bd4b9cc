"""A student folder takes the step lists that were found."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from sprint.base.door import read_json, read_text
from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.evaluate.search.lists import Found
from sprint.models.families import family_of_pipeline
from sprint.weights.card import CARD_FILE, STEP_LISTS, step_lists
from sprint.weights.folder import INDEX_FILE, complete_or_absent, pipeline_class
from sprint.weights.settings import SETTINGS_FILE, read_settings


def check_adoptable(student: str | Path) -> Path:
    """The folder itself. Raises SprintError unless sprint exported it."""
    folder = Path(student)
    if not (folder / INDEX_FILE).is_file() or not (folder / SETTINGS_FILE).is_file():
        raise SprintError(f"{student} is no folder that sprint exported; --adopt writes into one")
    return folder


def adopt(student: str | Path, found: Mapping[int, Found]) -> Path:
    """Make what was confirmed the student's own lists: in sprint.json, which `sprint sample` and all that
    draws with sprint read, and in its model card, which says how diffusers is told.  -> sprint.json

    For searched numbers of steps whose default stays, an earlier list of its own goes. Whole or not at all.
    Raises SprintError for anything but an exported folder.
    """
    folder = check_adoptable(student)
    read_settings(str(folder))  # raises for what is damaged
    settings = read_json(folder / SETTINGS_FILE)
    own = {len(times) - 1: times for times in settings.pop("times", [])}
    own = {steps: times for steps, times in own.items() if steps not in found}
    own |= {steps: row.times for steps, row in found.items() if row.holds}
    if own:
        settings["times"] = [[round(t, 6) for t in own[steps]] for steps in sorted(own)]
    card = folder / CARD_FILE
    family = family_of_pipeline(pipeline_class(folder))
    text = read_text(card) if card.is_file() else ""
    with complete_or_absent(folder) as place:
        shutil.copytree(folder, place, copy_function=_link, dirs_exist_ok=True)
        write_whole(place / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
        write_whole(
            place / CARD_FILE, text.partition(STEP_LISTS)[0].rstrip("\n") + "\n" + step_lists(family, own)
        )
    return folder / SETTINGS_FILE


def _link(source: str, target: str) -> None:
    """The same file under another name; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
