"""One time of a step list after the other: coordinate descent over a grid that gets finer."""

import math
from collections.abc import Callable, Sequence

from sprint.evaluate.search.lists import Times


def greedy_search(start: Times, grid: Sequence[float], score: Callable[[Times], float]) -> Times:
    """One middle time after the other: over all multiples of grid[0], then one finer spacing up and down.

    start   times from noise to 0; the first and the last stay (the paper moves the first one too)
    score   of a list; higher is better, and of equal ones the earlier stays. It is called again for the best
            list so far, so let it remember.
    """
    best = start
    for spacing in grid:
        for index in range(1, len(start) - 1):
            trials = candidates(best, index, spacing, everywhere=spacing == grid[0])
            best = max([best, *trials], key=score)
    return best


def candidates(times: Times, index: int, spacing: float, everywhere: bool) -> list[Times]:
    """Lists with another time at `index`, strictly between its neighbours.

    everywhere   all multiples of `spacing`, or else only `spacing` more and less
    """
    above, now, below = times[index - 1], times[index], times[index + 1]
    if everywhere:
        values = [k * spacing for k in range(1, math.ceil(above / spacing))]
    else:
        values = [now - spacing, now + spacing]
    rounded = [round(value, 4) for value in values]
    return [
        (*times[:index], value, *times[index + 1 :])
        for value in rounded
        if above > value > below and value != round(now, 4)
    ]
