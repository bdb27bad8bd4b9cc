"""The one way in: a thing is told what it is, and looked at."""

from collections.abc import Sequence
from pathlib import Path

from sprint.base.door import at_home
from sprint.doctor.data import examine_data
from sprint.doctor.findings import Finding
from sprint.doctor.model import AS_FOUND, Opening, examine_model
from sprint.doctor.recipe import examine_recipe
from sprint.doctor.run import examine_run
from sprint.doctor.what import Kind, kind_of

SHEETS = Path("doctor")  # where contact sheets lie


def examine(
    thing: str,
    overrides: Sequence[str] = (),
    against: str | None = None,
    opening: Opening = AS_FOUND,
    kind: Kind | None = None,
    out: Path = SHEETS,
) -> tuple[Kind, list[Finding]]:
    """thing        a model (all that `sprint convert` opens), a run's folder, a recipe or a data set
    overrides    key=value of a recipe, or of its data
    against      of a model or a run: the teacher to compare its weights with
    opening      of a model that does not tell
    out          folder for the sheet of a data set's first pictures

    -> what it is, what was found. Raises SprintError where there is nothing of that name.
    """
    what = kind_of(thing, kind)
    if what is Kind.model:
        return what, examine_model(thing, against, opening)
    if what is Kind.run:
        return what, examine_run(at_home(thing), against)
    if what is Kind.recipe:
        return what, examine_recipe(thing, overrides)
    return what, examine_data(thing, overrides, out)
