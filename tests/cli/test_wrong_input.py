"""Wrong input of every kind: one line, exit code 2, and nothing lost."""

import fcntl
import shutil
import signal
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.cli.cases import STUDENT_WEIGHTS, files_of_at_most, spawn, tree

pytest_plugins = "tests.cli.fixtures"


# ---- files and folders that are not there, or are something else --------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["distill", "missing"], "missing: no such recipe"),
        (["distill", "missing.yaml", "--dry-run"], "missing.yaml: no such recipe"),
        (["sample", "missing", "--prompt", "a dot"], "no file or folder missing"),
        (["sample", "empty", "--prompt", "a dot"], "no model in folder empty"),
        (["convert", "missing.safetensors"], "no file or folder missing.safetensors"),
        (["convert", "empty"], "no model in folder empty"),
        (["convert", "notes.txt"], "notes.txt is truncated or not a checkpoint: it is text"),
        (["sample", "empty", "--prompt", "a dot", "--out", "notes.txt"], "--out notes.txt is not a folder"),
        (["sample", "empty", "--prompt", "a dot", "--out", ""], "the name of the output is empty"),
        (["cache", "tiny", "-o", "~nobody-of-that-name/x"], "there is no such user"),
        (["evaluate", "~nobody-of-that-name/x"], "there is no such user"),
        (["evaluate", "tiny", "--prompts", "~nobody-of-that-name/x"], "there is no such user"),
        (["distill", "tiny", "teacher=~nobody-of-that-name/x", "--dry-run"], "there is no such user"),
        (
            ["distill", "tiny", "teacher=https://huggingface.co/a/b", "--dry-run"],
            "give its hub id alone: a/b",
        ),
        (["doctor", "hf://a/b"], "give its hub id alone: a/b"),
        (["doctor", "pictures.zip"], "Unzip it, and give that folder"),
        (
            ["distill", "empty", "--dry-run"],
            "no such recipe: it is a folder; a model is named by teacher=empty",
        ),
    ],
)
def test_missing(refusal, here, argv, words):
    (here / "empty").mkdir()
    (here / "notes.txt").write_text("a note")
    (here / "pictures.zip").write_bytes(b"PK")
    assert words in refusal(*argv)


@pytest.mark.parametrize("key", ["teacher", "teacher_family"])
def test_distill_from_a_folder_without_a_model(refusal, here, recipe, key):
    (here / "empty").mkdir()
    assert "empty" in refusal("distill", recipe, f"{key}=empty")


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_student_where_a_teacher_is_needed(refusal, here, recipe, student, option):
    line = refusal("distill", recipe, f"teacher={student}", *option)
    assert f"{student} is a student" in line and "a teacher is needed here" in line


# ---- recipes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distill.step=3", "'distill.step': no such key; the nearest is distill.steps"),
        ("optimizr=came", "'optimizr': no such key; the nearest is "),
        ("adapt.steps=many", "adapt.steps = 'many', but it takes a whole number"),
        ("wandb=perhaps", "wandb = 'perhaps', but it takes true or false"),
        ("evaluate.steps=[0]", "a student takes 1 to 4 steps"),
        ("evaluate.steps=[1,5]", "a student takes 1 to 4 steps"),
        ("seed=-1", "seed = -1, but it must be at least 0"),
        ("name=../elsewhere", "cannot name a folder in runs/"),
        ("distill.adversarial.taps=[7]", "the teacher's blocks are 0 to 1"),
        ("arch=0.6b", "arch = 0.6b has num_layers = 28"),
        ("again", "'again' is not an override; write key=value"),
    ],
)
def test_recipe_that_cannot_be(refusal, here, recipe, override, words):
    assert words in refusal("distill", recipe, override)


# ---- pictures and captions ----------------------------------------------------------------------------


@pytest.fixture
def pictures(here):
    folder = here / "pictures"
    folder.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.full((70, 70, 3), 90, np.uint8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a grey square")
    return folder


def no_caption(folder):
    (folder / "b.txt").unlink()


def no_picture(folder):
    (folder / "b.png").unlink()


def broken_pictures(folder):
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes((folder / f"{name}.png").read_bytes()[:60])


def empty_captions(folder):
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(" \n")


def nothing_left(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (no_caption, "pictures/b.png: picture without caption"),
        (no_picture, "pictures/b.txt: caption without picture"),
        (nothing_left, "pictures: no pictures there"),
        (shutil.rmtree, "pictures: no such folder"),
    ],
)
def test_folder_of_pictures(refusal, pictures, recipe, harm, words):
    harm(pictures)
    assert words in refusal("distill", recipe, "data.kind=folder", "data.path=pictures")


@pytest.mark.parametrize(
    ("harm", "words"), [(broken_pictures, "unreadable picture"), (empty_captions, "empty caption")]
)
def test_folder_of_bad_samples(sprint, here, pictures, recipe, harm, words):
    """Some may be bad, all may not; they are listed where the line says."""
    harm(pictures)
    result = sprint("distill", recipe, "data.kind=folder", "data.path=pictures")
    assert result.code == 2 and result.err.count("\n") == 1
    assert words in result.last_line and "runs/mini/bad_samples.jsonl" in result.last_line
    assert words in (here / "runs/mini/bad_samples.jsonl").read_text()


def test_size_that_the_autoencoder_cannot_divide(refusal, pictures, recipe):
    argv = ["data.kind=folder", "data.path=pictures", "data.size=66"]
    assert "data.size = 66" in refusal("distill", recipe, *argv)


# ---- sample -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "steps 0: a student takes 1 to 4; for any other number give a list of times"),
        (["--steps", "5"], "steps 5: a student takes 1 to 4; for any other number give a list of times"),
        (["--prompt", " "], "prompt 2 of 2 is empty"),
        (["--times", "1.5;0"], "--times 1.5;0: write numbers with commas"),
        (["--times", ""], "--times : write numbers with commas"),
        (["--times", "0.5,1,0"], "times must fall strictly"),
        (["--times", "1.5,0", "--steps", "2"], "steps 2, but the list of times makes 1"),
        (["--seed", "-1"], "seed -1"),
        (["--size", "65"], "size 65 is not a multiple of 4 pixels; the nearest is 64 or 68"),
        (["--size", "100000000"], "size 100000000: pictures of at most 16,384 pixels a side are drawn"),
        (["--guidance", "-1"], "--guidance -1"),
        (["--guidance", "1e308"], "--guidance 1e+308: give a number from 0 to 1,000"),
        (
            ["--seed", str(2**62)],
            "--seed 4611686018427387904: give a whole number of at least 0 and below 2**62",
        ),
        (["--device", "cuda:99"], "device cuda:99 cannot be used here: "),
        (["--device", "meta"], "device meta cannot be used here: "),
        (["--device", "toaster"], "device toaster cannot be used here: "),
    ],
)
def test_sample_what_cannot_be_drawn(refusal, here, student, options, words):
    assert words in refusal("sample", student, "--prompt", "a dot", *options)


def test_teacher_steps(refusal, here, teacher):
    assert "steps must be at least 1" in refusal("sample", teacher, "--prompt", "a dot", "--steps", "0")


@pytest.mark.parametrize(
    "argv",
    [
        ["paint"],
        ["distill"],
        ["sample", "tiny"],
        ["sample", "tiny", "--prompt", "a dot", "--steps", "two"],
        ["sample", "tiny", "--prompt", "a dot", "seed=3"],
        ["distill", "tiny", "--dry", "--quick"],
        ["convert", "tiny", "--to", "elsewhere"],
    ],
)
def test_usage(sprint, here, argv):
    code, out, err = sprint(*argv)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("sprint") and ": error: " in err.splitlines()[-1]


def test_usage_asks_only_for_what_is_required(sprint, here):
    last = sprint("distill").err.splitlines()[-1]
    assert last == (
        "sprint distill: error: the following arguments are required: recipe; "
        "right is, for example: sprint distill tiny (sprint distill --help tells the rest)"
    )


def test_no_verb_at_all_shows_what_there_is(sprint, here):
    code, out, err = sprint()
    assert (code, out) == (2, "") and "sprint distill tiny" in err and "search-steps" in err


# ---- a folder in use ----------------------------------------------------------------------------------


def test_folder_in_use_by_another_recipe(refusal, monkeypatch, recipe, finished):
    monkeypatch.chdir(recipe.parent)
    assert "runs/mini holds a run of another recipe" in refusal("distill", recipe, "adapt.steps=3")


def test_folder_in_use_by_another_process(refusal, here, recipe):
    folder = here / "runs" / "mini"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4321")
        lock.flush()
        assert "runs/mini is in use by process 4321" in refusal("distill", recipe)


def test_wrong_input_does_not_take_the_folder(sprint, refusal, here, recipe):
    """Put right, the command runs under the same name."""
    refusal("distill", recipe, "teacher=missing")
    assert sprint("distill", recipe, "adapt.steps=0", "distill.steps=1").code == 0


# ---- a full disk --------------------------------------------------------------------------------------


def weights(run) -> bytes:
    return (run / STUDENT_WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("size", "override", "words"),
    [
        (20_000, "seed=0", "cannot write checkpoint adapt-2"),
        (20_000, "adapt.steps=0", "runs/mini/teacher"),
        (4_000, "adapt.steps=0", "runs/mini/teacher"),
        (0, "seed=0", "runs/mini"),
    ],
)
def test_distill_on_a_full_disk(sprint, here, recipe, size, override, words):
    with files_of_at_most(size):
        result = sprint("distill", recipe, override)
    assert result.code == 2
    assert result.last_line.startswith("sprint: ") and words in result.last_line
    assert not (here / "runs/mini/teacher").exists()
    assert not [path for path in tree() if ".part" in path or ".writing" in path]


def test_distill_goes_on_when_there_is_room_again(sprint, here, recipe, finished):
    with files_of_at_most(20_000):
        assert sprint("distill", recipe).code == 2
    assert sprint("distill", recipe).code == 0
    assert weights(here / "runs/mini") == weights(finished)


def test_sample_on_a_full_disk(sprint, here, student):
    with files_of_at_most(100):
        code, _, err = sprint("sample", student, "--prompt", "a dot")
    assert (code, err) == (2, "sprint: samples/000000.png: File too large\n")
    assert list((here / "samples").iterdir()) == []


def test_convert_on_a_full_disk(sprint, here, student):
    with files_of_at_most(20_000):
        result = sprint("convert", student, "-o", "out")
    assert result.code == 2
    assert result.last_line == "sprint: cannot write out: File too large; nothing was left there"
    assert tree() == {}


# ---- Ctrl-C -------------------------------------------------------------------------------------------

MOMENTS = {
    "opening": "sprint.train.inputs.load_family",
    "start": "sprint.train.start.with_ones",
    "stage 1": "sprint.train.adapt.AdaptStage.update",
    "checkpoint": "sprint.engine.checkpoint._require_plain",
    "export": "sprint.weights.export._save_pipeline",
    "between": "sprint.train.run.DistillStage",
    "stage 2": "sprint.train.distill.DistillStage.update",
    "evaluation": "sprint.evaluate.run.draw",
    "page": "sprint.train.report.write.write_report",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted_run_goes_on(sprint, here, recipe, finished, monkeypatch, few_real_scenes, moment):
    """Stopped at a moment, the run ends with one line; the same command brings the same student."""
    argv = ["distill", recipe] + ["evaluate.prompts=6"] * (moment == "evaluation")
    with monkeypatch.context() as patch:
        interrupt_in(patch, MOMENTS[moment])
        result = sprint(*argv)
    assert result.code == 130
    assert result.last_line.startswith("sprint: ") and "same command" in result.last_line
    assert result.err.count("sprint: ") == 1 and "Traceback" not in result.err
    assert not [path for path in tree() if ".part" in path or ".writing" in path]
    assert sprint(*argv).code == 0
    assert weights(here / "runs/mini") == weights(finished)
    assert (here / "runs/mini/report.html").is_file()


def interrupt_in(patch, target: str) -> None:
    """SIGINT arrives each time that `target` begins."""
    module, _, name = target.rpartition(".")
    place = pytest.importorskip(module) if module.count(".") < 3 else None
    if place is None:
        outer, _, inner = module.rpartition(".")
        place = getattr(pytest.importorskip(outer), inner)
    real = getattr(place, name)

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    patch.setattr(place, name, interrupted)


@pytest.mark.parametrize("seconds", [0.3, 1.5])
def test_interrupted_process_while_it_imports(here, recipe, seconds):
    process = spawn("distill", recipe)
    at_work = psutil.Process(process.pid)
    while sum(at_work.cpu_times()[:2]) < seconds:  # of its own time, which a busy machine does not shorten
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "sprint: interrupted; the same command goes on from there\n"


def test_interrupted_process_while_it_trains(here, recipe):
    process = spawn("distill", recipe, "adapt.steps=100000", "save_every=100000")
    while (
        not (here / "runs/mini/metrics.jsonl").exists()
        or not (here / "runs/mini/metrics.jsonl").stat().st_size
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "sprint: saved adapt step " in err.splitlines()[-1] and "Traceback" not in err
    assert len(list((here / "runs/mini/checkpoints/adapt").iterdir())) == 1
