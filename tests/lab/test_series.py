"""No two series of scenes meet, and whoever takes scenes takes them from its own."""

import ast
from itertools import combinations
from pathlib import Path

import pytest

from sprint.base.errors import SprintError
from sprint.data import source
from sprint.data.source import SceneSource
from sprint.evaluate.search import steps
from sprint.lab import series
from sprint.lab.series import SERIES, TRAINING_SEEDS, training_seed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("one", "other"), list(combinations(SERIES, 2)))
def test_no_two_series_meet(one, other):
    a, b = SERIES[one], SERIES[other]
    assert a.step == b.step == 1 and len(a) > 0 and len(b) > 0
    assert a[-1] < b[0] or b[-1] < a[0]
    assert min(a[0], b[0]) >= 0 and max(a[-1], b[-1]) < 2**32  # one word of a generator's seed


def test_every_seed_of_the_table_is_in_it():
    named = {name: value for name, value in vars(series).items() if name.endswith("_SEED")}
    assert len(named) == 6
    for name, value in named.items():
        assert [one for one, seeds in SERIES.items() if value in seeds] == [
            name[:-5].lower().replace("_", " ")
        ]


def test_a_run_trains_on_its_own_series_and_on_no_other(monkeypatch):
    seen = []
    monkeypatch.setattr(source, "scene", lambda seed, i: seen.append(seed) or series.scene(seed, i))
    for data_seed in (0, 1, len(TRAINING_SEEDS) - 1):
        SceneSource(data_seed).samples(range(2))
    assert seen == [TRAINING_SEEDS[0]] * 2 + [TRAINING_SEEDS[1]] * 2 + [TRAINING_SEEDS[-1]] * 2
    with pytest.raises(SprintError, match=r"data.seed = 4000, but scenes have 4000 series to train on"):
        SceneSource(4000)
    with pytest.raises(SprintError, match=r"data.seed = -1, but it must be at least 0"):
        training_seed(-1)


def test_a_search_has_its_series_from_the_table():
    assert (steps.SEARCH_SEED, steps.CONFIRM_SEED) == (series.SEARCH_SEED, series.CONFIRM_SEED)


@pytest.mark.parametrize("folder", ["sprint", "tools"])
def test_nobody_else_has_seeds_of_its_own(folder):
    """`scene` is called with a seed that was handed on, or named by the table; never with a number or a sum."""
    calls = 0
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "scene":
                calls += 1
                told = node.args[0]
                seeds = told.value if isinstance(told, ast.Subscript | ast.Attribute) else told
                assert isinstance(seeds, ast.Name), f"{file}, line {node.lineno}"
                assert seeds.id.islower() or hasattr(series, seeds.id), f"{file}, line {node.lineno}"
    assert calls >= 3
