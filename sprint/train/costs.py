"""What each part of a run cost, kept beside it."""

import json
from pathlib import Path

from sprint.base.environment import peak_memory
from sprint.base.files import write_whole

COSTS = "costs.json"  # seconds by part and peak memory, kept over interruptions


def note_cost(folder: Path, part: str, seconds: float) -> None:
    """Remember what a part of the run took."""
    costs = read_costs(folder)
    costs["seconds"][part] = round(seconds, 1)
    costs["peak_memory"] = max(costs["peak_memory"], peak_memory())
    write_whole(folder / COSTS, json.dumps(costs, indent=1))


def read_costs(folder: Path) -> dict:
    file = folder / COSTS
    return json.loads(file.read_text()) if file.exists() else {"seconds": {}, "peak_memory": 0}
