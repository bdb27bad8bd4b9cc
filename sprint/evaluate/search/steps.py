"""At which times should a student take its 2, 3 or 4 steps? One time is searched after the other.

SANA-Sprint (Table 7) fixes one time and goes on to the next. So do we, from the default list, first over all
multiples of a coarse spacing and then around the best by finer ones; but the paper searches the first time too, and
here that stays at the default list's. Lists are chosen on one series of built-in scenes, and the winner meets the
default on another, of other noise: the best of many lists is partly lucky where it was chosen, and is not where it is
confirmed. There it has to be better by two standard errors of the difference, taken picture by picture, since both
lists draw the same captions from the same noise. Neither series, nor its noise, is what a report scores.
"""

import json
import math
import platform
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.evaluate.search.greedy import greedy_search
from sprint.evaluate.search.judge import Judge, paired_error
from sprint.evaluate.search.lists import (
    BATCH,
    LISTS_FILE,
    RESULT_FILE,
    Found,
    Search,
    Times,
)
from sprint.lab.scenes import SIZE
from sprint.lab.series import CONFIRM_SEED, SEARCH_SEED
from sprint.maths.schedule import student_times
from sprint.sample.generate import StudentGenerator
from sprint.sample.load import load_generator
from sprint.weights.model_hash import model_hash


def search_steps(search: Search, out: Path, device: str = "cpu") -> dict[int, Found]:
    """Search for every number of steps, and write OUT/search.json.  -> what was found, by number of steps

    Interrupted, the same call goes on: OUT/lists.jsonl remembers every list. Raises SprintError for a teacher,
    and for a student of other pictures than built-in scenes.
    """
    generator = load_generator(search.student, device)
    if not isinstance(generator, StudentGenerator):
        raise SprintError(f"{search.student} is a teacher; step lists are searched for students")
    if generator.size != SIZE:
        raise SprintError(
            f"{search.student} draws {generator.size} pixels; lists are scored on built-in scenes, {SIZE} pixels"
        )
    model = model_hash(search.student)
    found, calls = {}, 0
    with tqdm(total=search.calls, desc="searching", unit="call") as bar:
        judge = Judge(search, generator, model, out / LISTS_FILE, bar)
        for steps in search.steps:
            bar.set_description(f"searching {steps} steps")
            found[steps] = _search(judge, tuple(student_times(steps)))
            calls += search.lists(steps) * steps * math.ceil(search.prompts / BATCH)
            bar.update(calls - bar.n)  # lists that were known, or did not exist, cost nothing
    _write_result(search, found, model, judge.features and judge.features.name, out)
    return found


def _search(judge: Judge, default: Times) -> Found:
    def score(times: Times) -> float:
        figure = judge(times, SEARCH_SEED).figure
        return figure.value if figure.higher else -figure.value

    best = greedy_search(default, judge.search.grid, score)
    both = default, best
    searched, confirmed = (tuple(judge(t, seed) for t in both) for seed in (SEARCH_SEED, CONFIRM_SEED))
    figures = (tuple(judged.figure for judged in pair) for pair in (searched, confirmed))
    return Found(default, best, *figures, paired_error(*confirmed))


def _write_result(
    search: Search, found: dict[int, Found], model: str, network: str | None, out: Path
) -> None:
    record = {
        "search": asdict(search),
        "model_sha256": model,
        "feature_network": network,
        "series": {"searched": SEARCH_SEED, "confirmed": CONFIRM_SEED},
        "calls_at_most": search.calls,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "steps": {
            steps: asdict(row) | {"times": row.times, "holds": row.holds} for steps, row in found.items()
        },
    }
    write_whole(out / RESULT_FILE, json.dumps(record, indent=1) + "\n")
