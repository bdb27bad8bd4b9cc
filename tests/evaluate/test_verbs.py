"""`sprint evaluate` and `sprint compare` as a person meets them."""

import json
import re

import pytest

from sprint.base.errors import NotHereError
from sprint.cli.main import build_parser
from sprint.evaluate.metrics import fid as distance
from sprint.evaluate.metrics import metric as metrics

pytest_plugins = ("tests.cli.fixtures", "tests.evaluate.fixtures")


@pytest.fixture
def no_clip(monkeypatch):
    def missing(*_):
        raise NotHereError("CLIP is not here; fetch it with `hf download clip`")

    monkeypatch.setattr(metrics, "ClipScorer", missing)


@pytest.mark.parametrize("verb", ["evaluate", "compare"])
def test_help_teaches_by_example(sprint, verb):
    code, out, _ = sprint(verb, "--help")
    assert code == 0 and f"  sprint {verb} " in sprint("--help").out
    examples = [
        line.split("  ")[1].split() for line in out.splitlines() if line.startswith(f"  sprint {verb} ")
    ]
    assert len(examples) >= 3
    for _, *argv in examples:
        assert build_parser().parse_args(argv).verb.__name__ == verb


@pytest.mark.slow
def test_a_run_from_command_to_comparison(sprint, here, run_folder, no_clip, monkeypatch):
    monkeypatch.setattr(distance, "REFERENCE_SCENES", 20)
    argv = ["evaluate", run_folder, "--metrics", "scenes,fid,clip", "--count", "3", "--steps", "2"]
    code, out, err = sprint(*argv)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[1:-3]] == [
        "scene", "single", "two", "counting", "FID", "KID",
    ]  # fmt: skip
    assert out.splitlines()[-3] == "clip is left out: CLIP is not here; fetch it with `hf download clip`"
    assert re.split(r"\s{2,}", out.splitlines()[0].strip()) == ["student, 2 steps", "teacher, 20 steps"]
    assert out.endswith("result: evaluations/mini/result.json\npage: evaluations/mini/index.html\n")
    assert "sprint: clip is left out: CLIP is not here; fetch it with `hf download clip`\n" in err
    record = json.loads((here / "evaluations/mini/result.json").read_text())
    assert record["command"].startswith("sprint evaluate ") and "--count 3" in record["command"]
    assert record["left_out"].keys() == {"clip"} and len(record["columns"][0]["hash"]) == 64
    assert (
        record["protocols"]["fid"]["pictures"] == "3 built-in held-out scenes, fewer than the protocol's 600"
    )

    assert sprint(*argv, "--seed", "5", "--out", "other").code == 0
    code, out, _ = sprint("compare", "evaluations/mini", "other", "--out", "both.html")
    assert code == 0 and out.endswith("page: both.html\n") and "beware: seeds differ: " in out
    assert (here / "both.html").is_file()


def test_only_what_is_not_here(refusal, here, run_folder, no_clip):
    assert "CLIP is not here; fetch it" in refusal("evaluate", run_folder, "--metrics", "clip")


def test_geneval_without_its_prompts(refusal, here, run_folder):
    line = refusal("evaluate", run_folder, "--metrics", "geneval")
    assert "evaluation_metadata.jsonl, are not here; fetch them" in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["missing"], "no file or folder missing"),
        (["MODEL", "--metrics", "fid,beauty"], "--metrics beauty: no such metric; there are scenes, fid"),
        (["MODEL", "--metrics", ""], "--metrics : "),
        (["MODEL", "--steps", "1,two"], "--steps 1,two: write numbers with commas"),
        (["MODEL", "--steps", "9"], "--steps 9: "),
        (["MODEL", "--guidance", "nan"], "--guidance nan: give a number of at least 0"),
        (["MODEL", "--seed", "-1"], "--seed -1: give a whole number"),
        (["MODEL", "--count", "1"], "--count 1: FID needs at least 2"),
        (["MODEL", "--prompts", "missing.txt"], "--prompts missing.txt: no such file"),
        (["MODEL", "--prompts", "scenes", "--out", "notes.txt"], "--out notes.txt is not a folder"),
        (["MODEL", "--out", "full"], "--out full: holds notes.txt and no evaluation"),
        (["MODEL", "--teacher", "MODEL"], "a teacher is needed here"),
        (["MODEL", "--device", "nowhere"], "device nowhere cannot be used here"),
        (["MODEL", "--reference", "missing"], "--reference missing: no such file or folder"),
        (
            ["MODEL", "--clip-model", "a/mistyped/path"],
            "--clip-model a/mistyped/path: no such file or folder",
        ),
        (["MODEL", "--geneval-metadata", "missing.jsonl"], "--geneval-metadata missing.jsonl: no such file"),
        (["MODEL", "--teacher", "TEACHER", "--out", "full"], "--out full: holds notes.txt and no evaluation"),
        (["empty"], "no model in folder empty"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_drawn(refusal, here, run_folder, argv, words):
    (here / "full").mkdir()
    (here / "empty").mkdir()
    for file in ("notes.txt", "full/notes.txt"):
        (here / file).write_text("a note")
    names = {"MODEL": str(run_folder / "student"), "TEACHER": str(run_folder / "teacher")}
    assert words in refusal("evaluate", *(names.get(arg, arg) for arg in argv))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["a"], "compare takes two results or more"),
        (["a", "b"], "a: no result.json there; name a folder that `sprint evaluate` wrote"),
    ],
)
def test_compare_refuses(refusal, here, argv, words):
    assert words in refusal("compare", *argv)
