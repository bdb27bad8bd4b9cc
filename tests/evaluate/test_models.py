"""Which models are meant, what they are called, and the hash that tells them apart."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sprint.base.errors import SprintError
from sprint.evaluate.models import evaluation_folder, evaluation_name, find_models, own_evaluation, recipe_of
from sprint.recipe.schema import Evaluate
from sprint.weights.model_hash import model_hash

pytest_plugins = "tests.evaluate.fixtures"


def test_a_run_brings_its_teacher(run_folder):
    student, teacher = find_models(str(run_folder))
    assert (student.role, student.steps, student.small) == ("student", (1, 2, 4), True)
    assert (teacher.role, teacher.steps, teacher.path) == ("teacher", (20,), str(run_folder / "teacher"))
    (alone,) = find_models(str(run_folder / "teacher"), steps=[3, 5, 3])
    assert (alone.role, alone.steps, alone.called) == ("teacher", (3, 5), "")


def test_a_runs_recipe_says_what_its_evaluation_draws(run_folder):
    own = Evaluate(prompts=24, steps=(1, 3), teacher_steps=8)
    student, teacher = find_models(str(run_folder), own=own)
    assert student.steps == (1, 3) and teacher.steps == (8, 1)
    assert [teacher.role_at(steps) for steps in teacher.steps] == ["teacher", "undistilled"]
    (student, teacher) = find_models(str(run_folder), steps=[2], own=replace(own, teacher_steps=1))
    assert student.steps == (2,) and [teacher.role_at(steps) for steps in teacher.steps] == ["teacher"]
    assert len(find_models(str(run_folder), "tiny", own=own)[1].steps) == 1


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("evaluate: {prompts: 24}", 24),
        ("evaluate: {prompts: 0}", None),  # wants none
        ("name: x", None),
        ("evaluate: {beauty: 1}", None),
        ("evaluate: {prompts: many}", None),
        ("evaluate: 3", None),
        ("", None),
    ],
)
def test_what_a_recipe_says_or_does_not(run_folder, tmp_path, text, prompts):
    run = shutil.copytree(run_folder, tmp_path / "run")
    (run / "recipe.yaml").write_text(text)
    own = own_evaluation(str(run))
    assert (own and own.prompts) == prompts
    assert own_evaluation(str(run / "student")) is None


def test_a_damaged_recipe_of_a_run_is_named(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    (run / "recipe.yaml").write_text("[")
    with pytest.raises(SprintError, match=r"recipe\.yaml, line 1: not valid YAML"):
        own_evaluation(str(run))


def test_a_runs_result_lies_in_its_folder(run_folder):
    assert evaluation_folder(str(run_folder)) == run_folder / "evaluation"
    assert evaluation_folder(str(run_folder / "student")) == Path("evaluations/mini-student")
    assert evaluation_folder("owner/model") == Path("evaluations/model")


@pytest.mark.parametrize(
    ("steps", "teacher", "words"),
    [
        ([1, 5], None, "--steps 5: .* is a student and takes 1 to 4"),
        ([0], None, "--steps 0"),
        ([], "student", "is a student .*; a teacher is needed here"),
    ],
)
def test_models_that_do_not_fit(run_folder, steps, teacher, words):
    with pytest.raises(SprintError, match=words):
        find_models(str(run_folder / "student"), teacher and str(run_folder / teacher), steps)


def test_two_teachers_are_told_apart(run_folder, tmp_path):
    one = str(run_folder / "teacher")
    for other, names in (("tiny", ["mini-teacher", "tiny-built-in"]), ("copy", ["mini-teacher", "mine"])):
        if other == "copy":
            other = str(shutil.copytree(one, tmp_path / "mine"))
        assert [model.called for model in find_models(one, other)] == names


def test_a_model_beside_itself_is_refused_at_the_same_steps_alone(run_folder):
    path = str(run_folder / "teacher")
    with pytest.raises(SprintError, match="is the model itself, at 20 steps twice"):
        find_models(path, f"{path}/../teacher")
    assert [model.steps for model in find_models(path, path, [5])] == [(5,), (20,)]


def test_an_unfinished_run_says_so(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(SprintError, match="a run that has no student yet"):
        find_models(str(tmp_path))


def test_names(run_folder):
    assert evaluation_name(str(run_folder)) == "mini"
    assert evaluation_name(str(run_folder / "student")) == "mini-student"
    assert evaluation_name("owner/model") == "model" and evaluation_name("runs/tiny") == "tiny"
    assert evaluation_name("tiny") == "tiny-built-in"


def test_a_recipe_that_is_no_text_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(SprintError, match=r"recipe\.yaml is not UTF-8 text"):
        recipe_of(str(tmp_path))


# ---- identity ---------------------------------------------------------------------------------------


@pytest.fixture
def copy(run_folder, tmp_path):
    folder = shutil.copytree(run_folder / "student", tmp_path / "copy")
    assert model_hash(str(folder)) == model_hash(str(run_folder / "student"))
    return folder


@pytest.mark.parametrize("part", ["transformer/diffusion_pytorch_model", "text_encoder/model"])
def test_a_changed_weight_makes_another_hash(run_folder, copy, part):
    file = copy / f"{part}.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, file, {"format": "pt"})
    assert model_hash(str(copy)) != model_hash(str(run_folder / "student"))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("transformer/config.json", "guidance_embeds_scale", 0.2),
        ("vae/config.json", "scaling_factor", 0.5),
        ("text_encoder/config.json", "rms_norm_eps", 1e-3),
        ("tokenizer/tokenizer_config.json", "padding_side", "left"),
    ],
)
def test_a_changed_config_makes_another_hash(run_folder, copy, file, key, value):
    config = json.loads((copy / file).read_text())
    assert config.get(key) != value
    (copy / file).write_text(json.dumps(config | {key: value}))
    assert model_hash(str(copy)) != model_hash(str(run_folder / "student"))


def change_settings(folder, change):
    settings = json.loads((folder / "sprint.json").read_text())
    change(settings)
    (folder / "sprint.json").write_text(json.dumps(settings))


def test_another_way_of_reading_prompts_makes_another_hash(run_folder, copy):
    change_settings(copy, lambda settings: settings["text"].update(max_length=81))
    assert model_hash(str(copy)) != model_hash(str(run_folder / "student"))


def test_an_adopted_list_of_times_and_another_size_do_not(run_folder, copy):
    change_settings(copy, lambda settings: settings.update(times=[[1.5, 1.0, 0.0]], size=128))
    assert model_hash(str(copy)) == model_hash(str(run_folder / "student"))


@pytest.mark.parametrize("part", ["tokenizer", "vae/config.json", "text_encoder/model.safetensors"])
def test_a_missing_part_is_no_hash(copy, part):
    shutil.rmtree(copy / part) if (copy / part).is_dir() else (copy / part).unlink()
    with pytest.raises(SprintError, match="name a complete folder"):
        model_hash(str(copy))
