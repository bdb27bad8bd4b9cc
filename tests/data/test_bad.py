"""Counting and listing bad samples: shares, several writers, torn lines, files that cannot be written."""

import json

import numpy as np
import pytest

from sprint.base.errors import SprintError
from sprint.data.bad import ENOUGH, BadSamples
from sprint.data.items import BadSample


def wheres(file):
    return [json.loads(line)["where"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize(("total", "tried"), [(10**6, ENOUGH), (7, 7), (1, 1)])
def test_no_share_is_judged_before_enough_were_tried(total, tried):
    bad = BadSamples(0.0, total)
    for _ in range(tried - 2):
        bad.good()
    if tried > 1:
        bad.bad(BadSample("wrong size", "a"))
    with pytest.raises(
        SprintError, match=rf"^b: empty caption: blank; [12] of {tried} samples tried are bad"
    ):
        bad.bad(BadSample("empty caption", "b", "blank"))


def test_a_sample_counts_once_however_often_it_comes_up():
    """Epochs over 200 samples of which 2 are bad stay at a share of 1%."""
    bad = BadSamples(0.01, 200)
    for _ in range(30):
        for _ in range(198):
            bad.good()
        for where in ("a", "b"):
            bad.bad(BadSample("wrong size", where))
    assert bad.by_reason == {"wrong size": 2}
    with pytest.raises(SprintError, match="3 of 200 samples tried are bad"):
        bad.bad(BadSample("wrong size", "c"))


@pytest.mark.parametrize(("true_share", "stops"), [(0.005, False), (0.009, False), (0.02, True), (0.5, True)])
def test_a_share_is_judged_with_allowance_for_chance(true_share, stops):
    """Of 10⁶ samples 1% may be bad; 30 runs of 5000 random ones each, of which nearly none is judged wrongly."""
    draw, stopped = np.random.default_rng(0), 0
    for _ in range(30):
        bad = BadSamples(0.01, 10**6)
        try:
            for k, broken in enumerate(draw.random(5000) < true_share):
                bad.bad(BadSample("wrong size", str(k))) if broken else bad.good()
        except SprintError:
            stopped += 1
    assert stopped >= 29 if stops else stopped <= 2


def test_all_samples_are_judged_by_the_share_itself():
    bad = BadSamples(0.01, 1000)
    for _ in range(989):
        bad.good()
    for k in range(10):
        bad.bad(BadSample("wrong size", str(k)))
    with pytest.raises(SprintError, match=r"^10: wrong size; 11 of 1000 samples tried are bad"):
        bad.bad(BadSample("wrong size", "10"))


def test_reasons_are_counted_the_most_frequent_first():
    bad = BadSamples(1.0, 100)
    for where, reason in (("a", "empty caption"), ("b", "NaN latent"), ("c", "NaN latent")):
        bad.bad(BadSample(reason, where))
    assert list(bad.by_reason.items()) == [("NaN latent", 2), ("empty caption", 1)]
    assert bad.summary() == "2 NaN latent, 1 empty caption"


def test_processes_and_later_runs_add_to_one_list(tmp_path):
    file = tmp_path / "bad.jsonl"
    one, two = (BadSamples(1.0, 100, file) for _ in range(2))
    one.bad(BadSample("wrong size", "a", "3×3"))
    two.bad(BadSample("wrong size", "b"))
    two.bad(BadSample("wrong size", "a"))
    one.bad(BadSample("wrong size", "b"))
    one.bad(BadSample("wrong size", "c é"))
    assert wheres(file) == ["a", "b", "c é"]
    assert json.loads(file.read_text().splitlines()[0]) == {
        "where": "a",
        "reason": "wrong size",
        "detail": "3×3",
    }
    later = BadSamples(1.0, 100, file)
    later.bad(BadSample("wrong size", "b"))
    later.bad(BadSample("wrong size", "d"))
    assert wheres(file) == ["a", "b", "c é", "d"]
    assert two.by_reason == later.by_reason == {"wrong size": 2}


def test_a_line_torn_by_a_crash_costs_no_other(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"where": "a", "reason": "x", "detail": ""}\n{"whe')
    bad = BadSamples(1.0, 100, file)
    bad.bad(BadSample("wrong size", "a"))
    bad.bad(BadSample("wrong size", "b"))
    lines = file.read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[0])["where"] == "a" and json.loads(lines[2])["where"] == "b"


def test_a_list_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SprintError, match=r"/file/bad.jsonl: cannot be written: "):
        BadSamples(1.0, 100, tmp_path / "file" / "bad.jsonl").bad(BadSample("wrong size", "a"))
