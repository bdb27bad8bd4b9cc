"""The door for Python: `import sprint`, and what it opens."""

import ast
import inspect
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import SanaTransformer2DModel

import sprint as door
from sprint.sample.load import load_generator
from sprint.train.adapt import AdaptStage
from tests.cli.cases import ROOT, STUDENT_WEIGHTS

pytest_plugins = "tests.cli.fixtures"


def test_importing_it_is_quick():
    program = (
        "import sprint, sys; print(*{'torch', 'diffusers', 'numpy', 'omegaconf', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def examples() -> list[ast.Call]:
    """Calls of the door in its own docstrings."""
    texts = [door.__doc__, *(getattr(door, name).__doc__ for name in door.__all__)]
    blocks = [block for text in texts for block in re.findall(r"(?m)(?:^ {4,}.*\n)+", inspect.cleandoc(text))]
    trees = [ast.parse(inspect.cleandoc(block)) for block in blocks if "sprint." in block]
    return [
        node
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and re.fullmatch(r"sprint\.\w+", ast.unparse(node.func))
    ]


def test_examples_call_what_there_is():
    calls = examples()
    assert {ast.unparse(call.func) for call in calls} == {"sprint.load", "sprint.distill", "sprint.convert"}
    for call in calls:
        keys = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
        inspect.signature(getattr(door, call.func.attr)).bind(*call.args, **keys)


# ---- load -------------------------------------------------------------------------------------------


def test_load_draws_what_the_command_draws(student):
    draw = door.load(student, device="cpu")
    pictures = draw(["a dot", "two blue squares"], steps=1, seeds=3)
    expected = load_generator(str(student)).pictures(["a dot", "two blue squares"], [3, 4], 1)
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (64, 64))] * 2
    assert np.array_equal(np.stack(pictures), expected)


def test_one_prompt_seeds_guidance_and_defaults(student):
    draw = door.load(str(student), device="cpu")
    (one,) = draw("a dot")
    assert np.array_equal(one, draw.pictures(["a dot"], [0], 2)[0])
    swapped = draw(["a dot", "a dot"], seeds=[7, 0])
    assert np.array_equal(swapped[1], one) and not np.array_equal(swapped[0], one)
    assert np.array_equal(draw("a dot", guidance=1.0)[0], draw.pictures(["a dot"], [0], 2, 1.0)[0])
    assert np.array_equal(
        draw("a dot", times=[1.5, 0.0])[0], draw.pictures(["a dot"], [0], times=[1.5, 0.0])[0]
    )


def test_load_a_teacher(teacher):
    draw = door.load(teacher, device="cpu")
    (picture,) = draw(["a dot"], size=32)
    assert np.array_equal(picture, draw.pictures(["a dot"], [0], 20, size=32)[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing",), "no file or folder missing"),
        (("tiny", "toaster"), "device toaster cannot be used here: "),
        (("tiny", "cpu", "fp8"), "dtype fp8: choose one of fp32, bf16"),
    ],
)
def test_load_what_is_not_there(here, arguments, words):
    with pytest.raises(door.SprintError, match=words):
        door.load(*arguments)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 5}, "steps 5"),
        ({"seeds": [1, 2]}, "1 prompts but 2 seeds"),
        ({"guidance": -1}, "guidance -1"),
    ],
)
def test_draw_what_cannot_be(student, options, words):
    with pytest.raises(door.SprintError, match=words):
        door.load(student, device="cpu")(["a dot"], **options)


# ---- distill ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [3, ["a dot", 3], b"a dot"])
def test_a_prompt_that_is_no_text(student, prompts):
    with pytest.raises(TypeError):
        door.load(student, device="cpu")(prompts)


@pytest.mark.parametrize("override", [["distill.steps=1"], {"distill.steps": 1}, 3])
def test_an_override_that_is_no_text(here, override):
    with pytest.raises(TypeError, match="overrides are texts"):
        door.distill("tiny", override)


def test_distill_is_the_command(here, recipe, finished):
    run = door.distill(recipe)
    assert run == (Path("runs/mini"), Path("runs/mini/student"), Path("runs/mini/report.html"))
    assert (run.folder / STUDENT_WEIGHTS).read_bytes() == (finished / STUDENT_WEIGHTS).read_bytes()
    assert (
        f"sprint.distill({str(recipe)!r})" in json.loads((run.folder / "report.json").read_text())["command"]
    )


def test_distill_elsewhere_with_overrides(here, recipe):
    run = door.distill(recipe, "adapt.steps=0", "distill.steps=1", "name=short", runs="mine")
    assert run.folder == Path("mine/short") and run.report.is_file() and not Path("runs").exists()
    assert len(door.load(run.student, device="cpu")(["a dot"], steps=1)) == 1


def test_distill_what_cannot_be(here, recipe):
    with pytest.raises(door.SprintError, match="seed = -1, but it must be at least 0"):
        door.distill(recipe, "seed=-1")
    with pytest.raises(door.SprintError, match="huge: no such recipe"):
        door.distill("huge")


def test_distill_interrupted_goes_on(here, recipe, finished, monkeypatch):
    update = AdaptStage.update

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return update(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AdaptStage, "update", interrupted)
        with pytest.raises(
            KeyboardInterrupt, match=r"saved adapt step 1 .* the same call goes on from there"
        ):
            door.distill(recipe)
    run = door.distill(recipe)
    assert (run.folder / STUDENT_WEIGHTS).read_bytes() == (finished / STUDENT_WEIGHTS).read_bytes()


# ---- convert ----------------------------------------------------------------------------------------


def test_convert_there_and_back(here, student):
    there = door.convert(student, "student.safetensors", to="original")
    assert there.path == Path("student.safetensors") and there.path.is_file()
    back = door.convert(there.path)
    assert back.path == Path("student-trigflow")
    assert back.facts["certificate"]["bits"]["equal"] == "bit for bit"
    assert back.facts == json.loads((back.path / "trigflow.json").read_text())
    expected = SanaTransformer2DModel.from_pretrained(student / "transformer").state_dict()
    weights = SanaTransformer2DModel.from_pretrained(back.path).state_dict()
    assert all(weights[name].equal(weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "elsewhere"}, "choose one of trigflow"),
        ({"time_scale": "thick"}, "choose one of sparse, dense"),
    ],
)
def test_convert_what_cannot_be(here, student, options, words):
    with pytest.raises(door.SprintError, match=words):
        door.convert(student, **options)
    assert list(here.iterdir()) == []
