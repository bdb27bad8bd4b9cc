"""What a search found, for the terminal."""

from collections.abc import Mapping

from sprint.evaluate.search.lists import Found
from sprint.weights.card import show_times


def table(found: Mapping[int, Found]) -> str:
    """For the terminal: both lists of every number of steps, and which to use."""
    lines = [f"{'steps':6}{'times':42}{'searched':>16}{'fresh prompts':>16}"]
    for steps, row in found.items():
        pairs = zip(("default", "found"), (row.default, row.best), row.searched, row.confirmed, strict=True)
        for i, (name, times, searched, confirmed) in enumerate(pairs):
            if i and row.best == row.default:
                continue
            told = f"{name:8}{show_times(times)}"
            lines.append(f"{'' if i else steps!s:6}{told:42}{searched!s:>16}{confirmed!s:>16}")
        lines.append(f"{'':6}{verdict(row)}")
    return "\n".join(lines)


def verdict(row: Found) -> str:
    if row.best == row.default:
        return "no list was better: the default stays"
    if row.holds:
        return f"better by {row.gain:.3f} ± {row.error:.3f} on fresh prompts: use it"
    told = f"better by {row.gain:.3f} ± {row.error:.3f}, too little," if row.gain > 0 else "no better"
    return f"{told} on fresh prompts: the default stays"
