"""The command line where all is well."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from sprint.cli.main import build_parser
from sprint.recipe.load import load_recipe
from sprint.sample.load import load_generator
from tests.cli.cases import ROOT, STUDENT_WEIGHTS

pytest_plugins = "tests.cli.fixtures"

RECIPES = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))
PARAMETERS = {"0.6b": 591_747_872, "1.6b": 1_604_462_752}


# ---- help -------------------------------------------------------------------------------------------


def test_help_is_quick():
    """Nothing heavy is imported before a verb runs: that is what keeps `sprint --help` under 1.5 s."""
    program = (
        "import sys; from sprint.cli.main import build_parser; build_parser().format_help(); "
        "print(*{'torch', 'diffusers', 'transformers', 'numpy', 'omegaconf', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize("verb", ["distill", "recipes", "cache", "sample", "convert"])
def test_help_teaches_by_example(sprint, verb):
    code, out, _ = sprint(verb, "--help")
    assert code == 0
    examples = [line.split() for line in out.splitlines() if line.startswith(f"  sprint {verb} ")]
    assert len(examples) >= 4
    assert f"  sprint {verb} " in sprint("--help").out
    for _, *argv in examples:  # each example is one that the parser takes, but for the words beside it
        assert build_parser().parse_known_args(argv)[0].verb.__name__ == verb


def test_version(sprint):
    assert sprint("--version").out == "sprint 0.1.0\n"


# ---- distill ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.slow
def test_dry_run_of_every_recipe(sprint, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    before = set((ROOT / "runs").glob("*"))
    code, out, err = sprint("distill", name, "--dry-run", "name=dry-run-of-a-test")
    assert (code, err) == (0, "")
    assert "name: dry-run-of-a-test" in out and load_recipe(name).needs.split()[0] in out
    if name in PARAMETERS:
        assert f"{PARAMETERS[name]:,}" in out
    assert set((ROOT / "runs").glob("*")) == before


@pytest.mark.parametrize("order", [("--dry-run", "seed=7"), ("seed=7", "--dry-run")])
def test_keys_may_stand_on_either_side_of_an_option(sprint, recipe, order):
    code, out, _ = sprint("distill", recipe, *order)
    assert code == 0 and "seed: 7" in out


def test_distill_leaves_a_student_and_a_page(finished):
    files = {path.name for path in finished.iterdir()}
    assert {"teacher", "student", "recipe.yaml", "metrics.jsonl", "report.html", "report.json"} <= files
    assert list((finished / "checkpoints").iterdir()) == []
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["phase"]) for row in rows[:3]] == [
        ("adapt", "flow"),
        ("adapt", "flow"),
        ("distill", "G"),
    ]


@pytest.mark.slow
def test_distill_speaks_for_itself_alone(sprint, here, recipe):
    """Two lines of output; on standard error the engine and our own bars: no library's bars, no warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, out, err = sprint("distill", recipe, "adapt.steps=0")
    assert (code, out) == (0, "report: runs/mini/report.html\nstudent: runs/mini/student\n")
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    assert lines[0] == "engine single, 1 process on cpu"
    assert lines[1:] and all(line.startswith(("1/2 adapt", "2/2 distill")) for line in lines[1:]), err


def test_a_finished_run_is_not_run_again(sprint, monkeypatch, finished, recipe):
    monkeypatch.chdir(recipe.parent)
    before = (finished / STUDENT_WEIGHTS).stat().st_mtime_ns
    code, out, err = sprint("distill", recipe)
    assert (code, err) == (0, "") and "runs/mini/report.html" in out
    assert (finished / STUDENT_WEIGHTS).stat().st_mtime_ns == before


# ---- sample -----------------------------------------------------------------------------------------


def read(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_sample_writes_a_picture_a_prompt(sprint, here, student):
    prompts = ["--prompt", "a dot", "--prompt", "two blue squares"]
    code, out, err = sprint("sample", student, *prompts, "--seed", "3", "--steps", "1", "--out", "drawn")
    assert (code, out, err) == (0, "drawn/000003.png\ndrawn/000004.png\n", "")
    expected = load_generator(str(student)).pictures(["a dot", "two blue squares"], [3, 4], 1)
    assert np.array_equal(read("drawn/000003.png"), expected[0])
    assert np.array_equal(read("drawn/000004.png"), expected[1])


def test_sample_from_a_teacher_with_its_own_default(sprint, here, teacher):
    assert sprint("sample", teacher, "--prompt", "a dot", "--size", "32").out == "samples/000000.png\n"
    expected = load_generator(str(teacher)).pictures(["a dot"], [0], 20, size=32)
    assert np.array_equal(read("samples/000000.png"), expected[0])


def test_sample_with_times(sprint, here, student):
    argv = ["sample", student, "--prompt", "a dot"]
    sprint(*argv, "--out", "two")
    assert sprint(*argv, "--times", "1.5708,1.3,0", "--out", "own").code == 0
    assert sprint(*argv, "--times", "1.5708,1.2,1,0.8,0.4,0", "--out", "five").code == 0
    assert np.array_equal(read("own/000000.png"), read("two/000000.png"))
    assert not np.array_equal(read("five/000000.png"), read("two/000000.png"))


def test_long_prompt_is_cut_with_one_line(sprint, here, student):
    long = "abcdefghij" * 9  # a token a letter
    result = sprint("sample", student, "--prompt", long, "--prompt", long, "--out", "long")
    assert result.code == 0
    assert result.err == f"sprint: prompt cut to 80 tokens: {long[:60]}…\n"
    sprint("sample", student, "--prompt", long[:80], "--prompt", long[:80], "--out", "cut")
    assert np.array_equal(read("long/000000.png"), read("cut/000000.png"))


# ---- convert ----------------------------------------------------------------------------------------


def test_convert_there_and_back(sprint, here, student):
    code, out, _ = sprint("convert", student, "--to", "original", "-o", "student.safetensors")
    assert code == 0 and out.endswith("written to student.safetensors\n")
    code, out, _ = sprint("convert", "student.safetensors", "-o", "back")
    assert code == 0 and "come back bit for bit" in out
    theirs = student / "transformer" / "diffusion_pytorch_model.safetensors"
    back = here / "back" / "diffusion_pytorch_model.safetensors"
    assert theirs.stat().st_size > 100_000 and back.is_file()
