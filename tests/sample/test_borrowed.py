"""Models that bring no text encoder, and runs in the place of their students."""

import shutil

import numpy as np
import pytest

import sprint
from sprint.base.errors import SprintError
from sprint.base.names import BUILT_IN
from sprint.sample.load import load_generator
from sprint.weights.folder import student_of
from sprint.weights.model_hash import model_hash
from tests.weights.convert_cases import quiet

PROMPT, SEED = ["a red circle"], [3]


def picture(generator) -> np.ndarray:
    return generator.pictures(PROMPT, SEED, 2)


def test_a_converted_folder_draws_with_the_encoders_of_another(tmp_path):
    quiet(str(BUILT_IN["tiny"]), tmp_path / "converted")
    with pytest.raises(SprintError, match="name a folder that has them as --family"):
        load_generator(str(tmp_path / "converted"))
    ours = sprint.load(tmp_path / "converted", device="cpu", family="tiny")
    assert ours.size == load_generator("tiny").size
    assert (picture(ours) == picture(load_generator("tiny"))).all()
    known = model_hash(str(tmp_path / "converted"), "tiny")
    assert known == model_hash(str(tmp_path / "converted"), str(BUILT_IN["tiny"]))


def test_a_run_stands_for_its_student(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(BUILT_IN["tiny"], run / "student")
    assert student_of(str(run)) == str(run)  # a folder of that name is no run
    (run / "recipe.yaml").write_text("name: run\n")
    assert student_of(str(run)) == str(run / "student")
    assert (picture(load_generator(str(run))) == picture(load_generator("tiny"))).all()
    assert model_hash(str(run)) == model_hash(str(run / "student"))
    assert quiet(run, tmp_path / "out")["source"]["name"] == str(run / "student")
    shutil.rmtree(run / "student")
    (run / "student").mkdir()
    with pytest.raises(SprintError, match="a run that has no student yet"):
        load_generator(str(run))
    assert student_of("someone/model") == "someone/model"
    assert student_of("x" * 5000) == "x" * 5000
