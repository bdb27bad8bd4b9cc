"""The rehearsal: its parts, what it makes, what it measures, and one whole at the smallest size."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from sprint.base.errors import SprintError
from sprint.cli.main import build_parser
from sprint.cli.main import main as sprint_command
from sprint.lab.reader import score
from sprint.lab.scenes import scene
from sprint.lab.series import HELD_OUT_SEED
from sprint.models.sana.presets import transformer_config
from sprint.pages.png import read_png
from tools.rehearsal import __main__ as program
from tools.rehearsal import family, run
from tools.rehearsal.parts import Rehearsal
from tools.rehearsal.watch import Watched, watch

GIB = 2**30


# ---- the parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["0.6b", "1.6b", "tiny"])
def test_every_part_is_a_command_that_its_program_takes(name):
    parts = Rehearsal.of(name, ["text.max_length=30"]).parts()
    assert [part.name for part in parts] == ["make", "plan", "cache", "distill", "open"]
    for part in parts:
        if part.typed.startswith("sprint "):
            parsed = build_parser().parse_args(part.arguments[2:])
            assert parsed.recipe == name and "text.max_length=30" in parsed.overrides


def test_the_rehearsed_recipe_is_the_real_one_but_for_its_length_and_data():
    rehearsal = Rehearsal.of("0.6b")
    recipe, real = rehearsal.recipe, rehearsal.real
    assert (recipe.adapt.steps, recipe.distill.steps, recipe.distill.batch_size) == (1, 2, 4)
    assert (recipe.precision, recipe.distill.optimizer) == (real.precision, real.distill.optimizer)
    assert recipe.activation_checkpointing and recipe.data.size == 1024
    assert recipe.name == "random-sprint-0.6b"


@pytest.mark.parametrize("own", ["name=x", "data.path=x", "teacher=x"])
def test_what_a_rehearsal_sets_itself_is_not_to_be_given(own, capsys):
    assert program.main(["tiny", own]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and own.partition("=")[0] in said


# ---- what it makes ------------------------------------------------------------------------------------


def test_encoders_have_the_widths_of_the_real_ones():
    recipe, config = Rehearsal.of("0.6b").real, transformer_config("0.6b")
    factor = family.pixels_per_cell(recipe)
    assert (factor, family.pixels_per_cell(Rehearsal.of("tiny").real)) == (32, 8)
    autoencoder = family.autoencoder(config["in_channels"], factor).float()
    latent = autoencoder.encode(torch.rand(1, 3, 64, 96)).latent
    assert latent.shape == (1, 32, 2, 3) and latent.std() > 0
    assert autoencoder.decode(latent).sample.shape == (1, 3, 64, 96)
    states = family.text_encoder(400, config["caption_channels"])(torch.ones(1, 5, dtype=torch.long))[0]
    assert states.shape == (1, 5, 2304) and states.dtype == torch.bfloat16


def test_pictures_show_what_their_captions_say_at_any_size(tmp_path):
    family.draw_pictures(tmp_path, 256)
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.txt"))) == family.COUNT
    scenes = [scene(HELD_OUT_SEED, index) for index in range(family.COUNT)]
    pictures = [read_png(tmp_path / f"{index:02d}.png")[2::4, 2::4] for index in range(family.COUNT)]
    assert (tmp_path / "03.txt").read_text().strip() == scenes[3].caption
    assert score(pictures, [each.claim for each in scenes])["mean_over_samples"] > 0.9


# ---- what it measures ---------------------------------------------------------------------------------


def test_a_process_is_watched_to_its_end(tmp_path):
    code = """
import time
open('there', 'w')
time.sleep(0.5)
x = b'1' * (300 * 2**20)
time.sleep(0.5)
exit(3)
"""
    done = watch(["-c", code], tmp_path, {"there": tmp_path / "there", "never": tmp_path / "no"})
    assert done.code == 3 and done.seconds >= 1 and 0 < done.cpu_seconds < done.seconds + 1
    assert done.peak_memory > 300 * 2**20
    assert list(done.until) == ["there"] and done.until["there"] < 200 * 2**20


PARTS = {
    "make": {"seconds": 1.0, "cpu_seconds": 1.0, "peak_memory": GIB},
    "plan": {"seconds": 2.0, "cpu_seconds": 3.0, "peak_memory": GIB // 2},
    "distill": {
        "seconds": 10.0,
        "cpu_seconds": 20.0,
        "peak_memory": 16 * GIB,
        "stages": {
            "adapt": {"seconds": 4.0, "peak_memory": 8 * GIB},
            "distill": {"seconds": 5.0, "peak_memory": 16 * GIB},
        },
    },
}


def test_stages_are_compared_with_the_plan_less_the_libraries():
    plan = run.plan_of(Rehearsal.of("0.6b"))
    found = run.compared(PARTS, plan)
    assert (found["seconds"], found["peak_memory"]) == (13.0, 16 * GIB)
    for name, stage in zip(("adapt", "distill"), plan.stages, strict=True):
        parts = stage.memory[1]
        row = "activations, recomputed"  # the recipe has activation checkpointing
        expected = sum(size for key, size in parts.items() if not key.startswith("activations")) + parts[row]
        measured = PARTS["distill"]["stages"][name]["peak_memory"] - GIB // 2
        assert found["stages"][name]["planned_memory"] == pytest.approx(expected)
        assert found["stages"][name]["off"] == pytest.approx(measured / expected - 1, abs=1e-3)


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_too_little_room_is_one_line_and_nothing_is_made(what, tmp_path, monkeypatch, capsys):
    little = SimpleNamespace(available=GIB, total=GIB, free=GIB)
    if what == "memory":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(run.psutil, "virtual_memory", lambda: little)
    else:
        monkeypatch.setattr(run, "planned", lambda plan: {"stage": 0})
        monkeypatch.setattr(run.shutil, "disk_usage", lambda place: little)
    assert program.main(["tiny", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"too little {what}" in said and "1.0 GiB are free" in said
    assert list(tmp_path.iterdir()) == []


# ---- a whole one --------------------------------------------------------------------------------------

SMALLEST = ["adapt.start=ones", "distill.self_consistency=0", "distill.adversarial.taps=[1]"]


@pytest.fixture
def in_this_process(monkeypatch):
    """Stands in for `watch`: the same commands without their processes. `fails` names parts that end with a code."""
    started, fails = [], {}

    def start(arguments, folder, landmarks):
        AcceleratorState._reset_state(reset_partial_state=True)
        module, *rest = arguments[1:]
        started.append(module if module != "sprint" else rest[0])
        if started[-1] in fails:
            return Watched(fails[started[-1]], 1.0, 1.0, GIB, {})
        with monkeypatch.context() as there:
            there.chdir(folder)
            command = sprint_command if module == "sprint" else importlib.import_module(module).main
            command(list(rest))
        return Watched(0, 1.0, 2.0, 3 * GIB, dict.fromkeys(landmarks, 2 * GIB))

    yield SimpleNamespace(start=start, started=started, fails=fails)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_a_whole_rehearsal_goes_on_where_it_was_and_leaves_a_page(tmp_path, in_this_process):
    folder, rehearsal = tmp_path / "out", Rehearsal.of("tiny", SMALLEST)
    in_this_process.fails["cache"] = 2
    with pytest.raises(SprintError, match="cache ended with code 2"):
        run.rehearse(rehearsal, folder, in_this_process.start)
    del in_this_process.fails["cache"], in_this_process.started[:]
    page = run.rehearse(rehearsal, folder, in_this_process.start)
    assert in_this_process.started == ["cache", "distill", "tools.rehearsal.plain"]
    record = json.loads((folder / run.RECORD).read_text())
    assert list(record["parts"]) == ["make", "plan", "cache", "distill", "open"]
    assert record["seconds"] == 5.0 and record["stages"].keys() == {"adapt", "distill"}
    pictures = record["drawn"]["pictures"]
    assert {steps: found["shape"] for steps, found in pictures.items()} == {n: [64, 64, 3] for n in "124"}
    assert all(read_png(folder / "drawn" / f"{steps}.png").std() > 0 for steps in pictures)
    assert str(tmp_path) not in (folder / run.RECORD).read_text() + page.read_text()
    assert "random" in page.read_text() and page.read_text().count("<img ") == 3
    run.rehearse(rehearsal, folder, in_this_process.start)
    assert len(in_this_process.started) == 3  # nothing was repeated
    with pytest.raises(SprintError, match="another rehearsal"):
        run.rehearse(Rehearsal.of("tiny"), folder, in_this_process.start)
