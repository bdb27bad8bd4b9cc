"""What another run would change: of this recipe measured, of any other said in general."""

import math

import pytest

from sprint.base.errors import SprintError
from sprint.recipe.load import load_recipe
from sprint.train.report.spread import (
    GENERAL,
    Runs,
    Spread,
    family_hash,
    read_spread,
    spread_words,
)

SCORES, FIDS = [0.70, 0.74, 0.78], [6.0, 8.0, 10.0]


def spread(recipe="tiny") -> Spread:
    figures = [
        Runs("student", 4, "scene score", SCORES, 0.67, 0.018),
        Runs("student", 4, "FID", FIDS, 9.0),
        Runs("teacher", 20, "scene score", SCORES, 0.7, 0.016),
    ]
    return Spread(family_hash(load_recipe(recipe)), recipe, [0, 1, 2], figures)


def test_words_are_of_the_seeds_and_of_the_kernels():
    words = spread_words(load_recipe("tiny", ["seed=7", "name=other"]), "student", 4, spread())
    assert words == (
        "Between runs of this recipe, 3 seeds on our machine, the score at 4 steps moved by ±0.040 (over prompts: "
        "±0.018) and FID by ±2; the kernels of a smaller processor moved them by -0.030 and +3."
    )


@pytest.mark.parametrize(
    ("overrides", "role", "steps"),
    [(["distill.steps=40"], "student", 4), ([], "student", 3), ([], "teacher", 20)],
    ids=["another recipe", "steps that nobody measured", "without FID"],
)
def test_of_what_was_not_measured_nothing_is_claimed(overrides, role, steps):
    assert spread_words(load_recipe("tiny", overrides), role, steps, spread()) == GENERAL
    assert spread_words(load_recipe("tiny"), "student", 4, None) == GENERAL


def test_the_file_goes_round_and_a_damaged_one_is_refused(tmp_path):
    file = tmp_path / "spread.json"
    assert read_spread(file) is None
    file.write_text(spread().text())
    assert read_spread(file) == spread()
    for text in ("", "[]", "{}", '{"figures": [{}]}'):
        file.write_text(text)
        with pytest.raises(SprintError, match=r"spread\.json"):
            read_spread(file)


def test_the_one_that_is_shipped_can_be_read():
    found = read_spread()
    assert found is None or all(len(runs.seeds) == len(found.seeds) for runs in found.figures)


def test_a_deviation_has_one_less_below_its_root():
    assert Runs("student", 1, "FID", [1.0, 3.0]).deviation == pytest.approx(math.sqrt(2))
    assert math.isnan(Runs("student", 1, "FID", [1.0]).deviation) and Runs("s", 1, "FID", [1.0]).shift is None
