"""What each part of a run cost, kept beside it."""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from sprint.base.door import read_as
from sprint.base.environment import peak_memory
from sprint.base.errors import SprintError
from sprint.base.files import write_whole

log = logging.getLogger(__name__)
COSTS = "costs.json"  # kept over interruptions

Amount = Annotated[float, Field(ge=0, le=1e18)]


@dataclass
class Costs:
    """Seconds by part of the run, and its peak memory in bytes."""

    seconds: dict[str, Amount] = field(default_factory=dict)
    peak_memory: Annotated[int, Field(ge=0, le=10**18)] = 0


def note_cost(folder: Path, part: str, seconds: float) -> None:
    """Remember what a part of the run took."""
    costs = read_costs(folder)
    costs.seconds[part] = round(seconds, 1)
    costs.peak_memory = max(costs.peak_memory, peak_memory())
    write_whole(folder / COSTS, json.dumps(asdict(costs), indent=1))


def read_costs(folder: Path) -> Costs:
    """What was noted; nothing, with a warning, where the file cannot be read."""
    file = folder / COSTS
    if not file.exists():
        return Costs()
    try:
        return read_as(Costs, file)
    except SprintError as error:
        log.warning("%s; what it said of time and memory is lost", error)
        return Costs()
