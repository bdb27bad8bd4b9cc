import errno
import json
import os
import re

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline, SanaSprintPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from sprint.base.errors import SprintError
from sprint.maths.schedule import student_times
from sprint.models.sana.family import Sana
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from sprint.sample.generate import StudentGenerator, TeacherGenerator
from sprint.sample.load import load_generator
from sprint.weights.card import student_card, write_card
from sprint.weights.convert import convert
from sprint.weights.export import export_student, export_teacher, load_student
from sprint.weights.load import load_teacher
from sprint.weights.settings import read_settings
from tests.sample.test_generate import (
    PROMPTS,
    SEEDS,
    SIZE,
    WIDTH,
    levels_apart,
    mini_family,
    mini_network,
    mini_student,
)

FACTS = {
    "recipe": "tiny",
    "teacher": "the tiny family",
    "data": "captioned scenes",
    "prompt": PROMPTS[0],
    "scores": {"teacher, 20 steps": {"scene score": 0.7123, "FID": 3.4}, "student, 1 step": {"FID": 4.1}},
}


@pytest.fixture(scope="module")
def network():
    return mini_student()


@pytest.fixture(scope="module")
def logvar():
    torch.manual_seed(7)
    return nn.Linear(WIDTH, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, network, logvar):
    return export_student(tmp_path_factory.mktemp("run") / "student", network, logvar, mini_family(), FACTS)


def draw_with_diffusers(folder, steps: int, **settings) -> np.ndarray:
    pipeline = SanaSprintPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        PROMPTS,
        num_inference_steps=steps,
        height=SIZE,
        width=SIZE,
        use_resolution_binning=False,
        max_sequence_length=20,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        **({} if steps == 2 else {"intermediate_timesteps": None}) | settings,
    ).images
    return np.stack([np.array(picture) for picture in pictures])


# ---- pixel by pixel -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_pictures_are_those_of_diffusers(folder, steps):
    theirs = draw_with_diffusers(folder, steps, complex_human_instruction=None)
    ours = load_generator(str(folder)).pictures(PROMPTS, SEEDS, steps)
    assert theirs.std() > 10
    assert levels_apart(ours, theirs) <= 1


def test_pictures_behind_the_instruction_are_those_of_diffusers(tmp_path, network):
    folder = export_student(tmp_path / "student", network, None, mini_family(instruction=True), {})
    theirs = draw_with_diffusers(folder, 2, guidance_scale=4.0)
    ours = load_generator(str(folder)).pictures(PROMPTS, SEEDS, 2, guidance_scale=4.0)
    assert levels_apart(ours, theirs) <= 1


def test_pictures_are_those_of_the_network_in_memory(folder, network):
    in_memory = StudentGenerator(TrigFlowView(network, DENSE_TIME), mini_family())
    on_disk = load_generator(str(folder))
    assert on_disk.size == SIZE and on_disk.view.time_scale == DENSE_TIME
    assert torch.equal(in_memory.latents(PROMPTS, SEEDS, 3), on_disk.latents(PROMPTS, SEEDS, 3))


def test_adapted_teacher_is_that_of_diffusers(tmp_path):
    """Dense time reaches `SanaPipeline` too, through its own solver at first order."""
    family, network = mini_family(), mini_network(qk_norm=True)
    folder = export_teacher(tmp_path / "teacher", network, family, {})
    pipeline = SanaPipeline.from_pretrained(folder, local_files_only=True)
    assert pipeline.scheduler.config.flow_shift == 3.0
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, solver_order=1)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        num_inference_steps=20,
        height=SIZE,
        width=SIZE,
        use_resolution_binning=False,
        max_sequence_length=20,
        complex_human_instruction=None,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    ).images
    ours = load_generator(str(folder))
    assert isinstance(ours, TeacherGenerator) and ours.view.time_scale == DENSE_TIME
    latents = ours.latents(PROMPTS, SEEDS, 20)
    # not rounding: its solver starts at t_fm = 0.9997, not at 1; under sparse time the two would be 0.42 apart
    assert (latents - theirs).std() / theirs.std() < 2e-3


# ---- there and back -----------------------------------------------------------------------------------


def test_load_student_gives_back_every_bit(folder, network, logvar):
    loaded, head = load_student(folder)
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(head.weight, logvar.weight) and torch.equal(head.bias, logvar.bias)


def test_student_without_logvar(tmp_path, network):
    folder = export_student(tmp_path / "student", network, None, mini_family(), {})
    assert load_student(folder)[1] is None


def test_converted_to_original_and_back(folder, network, logvar, tmp_path):
    original = tmp_path / "student.safetensors"
    convert(folder, original, to="original", progress=False)
    tensors = load_file(original)
    assert torch.equal(tensors["logvar_linear.weight"], logvar.weight)
    assert tensors["cfg_embedder.mlp.0.weight"].shape == (WIDTH, 256)
    assert tensors["blocks.1.attn.q_norm.weight"].shape == (WIDTH,)
    record = convert(original, tmp_path / "back", progress=False)
    assert record["time"] == "dense"
    back, head = load_student(tmp_path / "back")
    for name, tensor in network.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert torch.equal(head.bias, logvar.bias)


def test_adapted_teacher_comes_back_with_its_clock(tmp_path):
    network = mini_network(qk_norm=True)
    folder = export_teacher(tmp_path / "teacher", network, mini_family(), FACTS)
    loaded, time_scale = load_teacher(folder)
    assert time_scale == DENSE_TIME
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in network.state_dict().items())
    (folder / "transformer" / "trigflow.json").unlink()
    assert load_teacher(folder)[1] == DENSE_TIME  # diffusers' timestep_scale tells it as well


# ---- what lies beside the weights ---------------------------------------------------------------------


def test_code_of_the_card_runs(folder, tmp_path, monkeypatch):
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    generator = load_generator(str(folder))
    for name, steps in (("one_step.png", 1), ("two_steps.png", 2)):
        ours = generator.pictures([FACTS["prompt"]], [0], steps)[0]
        assert levels_apart(np.array(Image.open(name)), ours) <= 1


def test_card_tells_the_facts(folder):
    card = (folder / "README.md").read_text()
    assert "- Recipe: tiny\n- Teacher: the tiny family\n- Data: captioned scenes\n" in card
    assert "| model | scene score | FID |\n| --- | ---: | ---: |\n" in card
    assert "| teacher, 20 steps | 0.712 | 3.4 |\n| student, 1 step | – | 4.1 |\n" in card
    assert "sprint sample student --prompt 'a red circle' --steps 2 --seed 0" in card


def test_card_is_written_anew_when_the_scores_are_known(tmp_path, network):
    student = export_student(tmp_path / "student", network, None, mini_family(), {"recipe": "tiny"})
    teacher = export_teacher(tmp_path / "teacher", mini_network(qk_norm=True), mini_family(), {})
    assert "Scores" not in (student / "README.md").read_text()
    for folder, words in (
        (student, "# student: pictures in 1 to 4"),
        (teacher, "# teacher: a flow-matching"),
    ):
        card = write_card(folder, FACTS).read_text()
        assert words in card and "| student, 1 step | – | 4.1 |" in card and f"{SIZE}×{SIZE} pixels" in card


def test_trigflow_and_settings(folder):
    clock = json.loads((folder / "transformer" / "trigflow.json").read_text())
    assert (clock["time"], clock["time_scale"], clock["sigma_data"]) == ("dense", 1.0, 0.5)
    assert clock["network"]["guidance"] and clock["network"]["qk_norm"] and clock["network"]["depth"] == 2
    assert clock["tensors"]["extra"] == ["logvar_linear.weight", "logvar_linear.bias"]
    settings = json.loads((folder / "sprint.json").read_text())
    assert settings == {"text": {"max_length": 20, "instruction": False}, "size": SIZE, "recipe": "tiny"}


def test_no_path_of_this_machine_is_written(folder, tmp_path):
    """Not even after the parts were loaded from one."""
    family, (network, _) = load_generator(str(folder)).family, load_student(folder)
    again = export_student(tmp_path / "again", network, None, family, {})
    for file in again.rglob("*.json"):
        assert str(folder.parent) not in file.read_text(), file
        assert str(tmp_path) not in file.read_text(), file


# ---- whole or not at all ------------------------------------------------------------------------------


def contents(folder) -> dict:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_new_export_replaces_an_older_one(tmp_path, logvar):
    folder = tmp_path / "student"
    export_student(folder, mini_student(seed=1), logvar, mini_family(), {})
    export_student(folder, mini_student(seed=2), None, mini_family(), {})
    assert torch.equal(load_student(folder)[0].proj_out.weight, mini_student(seed=2).proj_out.weight)
    assert not (folder / "transformer" / "logvar.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failed_export_leaves_the_older_one(tmp_path, monkeypatch, logvar, error):
    folder = export_student(tmp_path / "student", mini_student(), logvar, mini_family(), {})
    before = contents(tmp_path)

    def fail(*_):
        raise error

    monkeypatch.setattr("sprint.weights.export.save_file", fail)
    with pytest.raises(SprintError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        export_student(folder, mini_student(seed=1), logvar, mini_family(), {})
    if isinstance(error, OSError):
        assert "student: No space left on device; it is as it was" in str(raised.value)
    assert contents(tmp_path) == before


def test_older_export_comes_back_when_the_last_move_fails(tmp_path, monkeypatch, network):
    folder = export_student(tmp_path / "student", network, None, mini_family(), {})
    before, replace = contents(tmp_path), os.replace

    def refuse_part(source, target):
        if source.parent.name.endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_part)
    with pytest.raises(SprintError, match="Input/output error"):
        export_student(folder, mini_student(seed=1), None, mini_family(), {})
    assert contents(tmp_path) == before


def test_scraps_of_a_killed_export_do_not_hinder(tmp_path, network):
    for scrap in (".student.part", ".student.old"):
        (tmp_path / scrap).mkdir()
        (tmp_path / scrap / "weights").write_text("half")
    for _ in range(2):
        export_student(tmp_path / "student", network, None, mini_family(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_foreign_folder_is_refused(tmp_path, network):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SprintError, match="holds something that is no exported model"):
        export_student(tmp_path, network, None, mini_family(), {})
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_place_under_a_file_is_refused(tmp_path, network):
    (tmp_path / "file").touch()
    with pytest.raises(SprintError, match=r"cannot write .*/file/student: Not a directory"):
        export_student(tmp_path / "file" / "student", network, None, mini_family(), {})


def test_wrong_kind_of_network(tmp_path, folder, network):
    with pytest.raises(SprintError, match="this network is a teacher"):
        export_student(tmp_path / "x", mini_network(), None, mini_family(), {})
    with pytest.raises(SprintError, match="this network is a student"):
        export_teacher(tmp_path / "x", network, mini_family(), {})
    teacher = export_teacher(tmp_path / "teacher", mini_network(qk_norm=True), mini_family(), {})
    with pytest.raises(SprintError, match="is a teacher"):
        load_student(teacher)
    with pytest.raises(SprintError, match="is a student"):
        load_teacher(folder)


def test_own_step_lists_reach_the_settings_the_card_and_the_sampler(tmp_path, network):
    facts = {"times": [[1.5708, 0.8, 0.0]]}
    folder = export_student(tmp_path / "student", network, None, mini_family(), facts)
    assert read_settings(str(folder)).times == ((1.5708, 0.8, 0.0),)
    assert load_generator(str(folder)).times(2) == [1.5708, 0.8, 0.0]
    assert load_generator(str(folder)).times(1) == student_times(1)
    card = write_card(folder, {"recipe": "tiny"}).read_text()
    assert "- 2 steps: `1.5708,0.8,0`" in card
    assert "found these" not in card and "`sprint sample` at the default times" in card
    assert "Step lists" not in student_card(
        Sana(), "student", read_settings(str(folder))._replace(times=()), {}
    )
