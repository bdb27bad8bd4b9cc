"""`sprint doctor`: what a thing is, the lines, the exit code."""

import pytest

from sprint.base.errors import SprintError
from sprint.doctor.findings import exit_code, lines, note, ok, verdict, wrong
from sprint.doctor.what import Kind, kind_of
from tests.doctor.cases import WEIGHTS, edited
from tests.doctor.test_data import write

pytest_plugins = ("tests.doctor.fixtures", "tests.cli.fixtures")


def test_lines_are_aligned_and_the_worst_comes_first():
    found = [ok("weights", "all finite"), note("dtype", "half\x1b[31m"), wrong("movement", "none", "train")]
    assert verdict("x", found) == "x: 1 thing is wrong, first movement (3 checks, 1 note)"
    assert lines(found) == [
        "wrong  movement  none",
        "                 → train",
        "note   dtype     half [31m",
        "ok     weights   all finite",
    ]
    assert verdict("x", found[:1]) == "x: nothing is wrong (1 check, 0 notes)"
    assert verdict("x", found[2:] * 2).startswith("x: 2 things are wrong")
    assert (exit_code(found), exit_code(found[:2])) == (1, 0)


def test_what_a_name_stands_for(here, pair, run):
    assert kind_of(str(pair / "student")) is kind_of(str(pair / "student" / "transformer")) is Kind.model
    assert kind_of(str(pair / "student" / WEIGHTS)) is kind_of("owner/name") is Kind.model
    assert kind_of(str(run())) is Kind.run
    assert kind_of("tiny") is kind_of("0.6b") is Kind.recipe
    assert kind_of("tiny", Kind.model) is Kind.model
    (here / "mine.yaml").write_text("name: mine")
    assert kind_of("mine.yaml") is Kind.recipe
    write(here / "pictures", 1)
    (here / "prompts.txt").write_text("a dot")
    assert kind_of("pictures") is kind_of("prompts.txt") is Kind.data
    (here / "empty").mkdir()
    (here / "thing.xyz").write_text("")
    for unclear in ("empty", "thing.xyz"):
        with pytest.raises(SprintError, match="Say which: --kind"):
            kind_of(unclear)
    with pytest.raises(SprintError, match="no model, run, recipe or data of that name"):
        kind_of("nowhere/at/all")


def test_a_model_that_is_well_and_one_that_is_not(sprint, here, pair):
    code, out, _ = sprint("doctor", pair / "student", "--against", pair / "teacher")
    assert code == 0 and out.splitlines()[0].endswith("nothing is wrong (12 checks, 0 notes)")
    student = edited(pair / "student", here / "student", lambda name, weight: weight * float("nan"))
    code, out, _ = sprint("doctor", student)
    assert code == 1 and "first weights" in out.splitlines()[0]


def test_data_and_their_page(sprint, here):
    write(here / "pictures", 3)
    code, out, _ = sprint("doctor", "pictures", "data.size=64", "--out", "seen")
    assert code == 0 and "seen/pictures.html" in out and (here / "seen" / "pictures.html").is_file()
    assert sprint("doctor", "pictures", "--out", "seen")[0] == 1  # at 1024 pixels they are small


def test_the_recipe_and_the_model_of_one_name(sprint, here):
    assert sprint("doctor", "tiny").out.startswith("tiny: nothing is wrong (10 checks")
    code, out, _ = sprint("doctor", "tiny", "--kind", "model", "--time-scale", "dense")
    assert code == 1 and "--time-scale sparse" in out


def test_bad_input_is_one_line(refusal, here, pair, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no model, run, recipe or data" in refusal("doctor", "nowhere/at/all")
    assert "no such folder" in refusal("doctor", "absent", "--kind", "run")
    assert "owner/name" in refusal("doctor", "owner/name")
    assert "no such key" in refusal("doctor", "tiny", "distil.steps=3")
    assert "--against is for a model or a run" in refusal("doctor", "tiny", "--against", "tiny")
    assert "key=value is for a recipe or a data" in refusal("doctor", pair / "student", "data.size=64")


def test_a_run_from_beginning_to_end(sprint, finished):
    """A real one, of random networks: what was trained has moved, and its updates were counted."""
    _, out, _ = sprint("doctor", finished)
    assert "the student is 0." in out and "of its norm away from the adapted teacher" in out
    assert "the student: none of 2 was skipped" in out
    assert "no update was kept" not in out
