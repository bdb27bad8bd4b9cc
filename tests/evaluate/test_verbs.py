"""`sprint evaluate` and `sprint compare` as a person meets them."""

import json
import re
import shutil
from pathlib import Path

import pytest

from sprint.base.errors import NotHereError
from sprint.cli.main import build_parser
from sprint.evaluate.metrics import clip
from sprint.evaluate.metrics import fid as distance
from sprint.evaluate.metrics.registry import METRICS
from sprint.evaluate.result import read_result
from sprint.train.report.write import evaluate_run

pytest_plugins = ("tests.cli.fixtures", "tests.evaluate.fixtures")


@pytest.fixture
def no_clip(monkeypatch):
    def missing(*_):
        raise NotHereError("CLIP is not here; fetch it with `hf download clip`")

    monkeypatch.setattr(clip, "ClipScorer", missing)


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
def test_help_tells_every_metric_and_where_a_result_lies(sprint):
    out = sprint("evaluate", "--help").out
    for metric in METRICS.values():
        better = "higher" if metric.higher else "lower"
        assert f"  {metric.name:12}{metric.about}; {better} is better" in out
    assert "RUN/evaluation" in out and "evaluations/NAME" in out


def test_a_run_from_command_to_comparison(sprint, here, run_folder, no_clip, monkeypatch):
    monkeypatch.setattr(distance, "REFERENCE_SCENES", 20)
    run = shutil.copytree(run_folder, here / "mini")
    argv = ["evaluate", "mini", "--metrics", "scenes,fid,clip", "--count", "3", "--steps", "2"]
    code, out, err = sprint(*argv)
    assert code == 0, err
    assert [re.split(r"\s{2,}", line)[0] for line in out.splitlines()[1:-3]] == [
        "scene score", "single object", "two objects", "counting", "FID", "KID",
    ]  # fmt: skip
    assert out.splitlines()[-3] == "clip is left out: CLIP is not here; fetch it with `hf download clip`"
    assert re.split(r"\s{2,}", out.splitlines()[0].strip()) == ["student, 2 steps", "teacher, 20 steps"]
    assert out.endswith("result: mini/evaluation/result.json\npage: mini/evaluation/index.html\n")
    assert "sprint: clip is left out: CLIP is not here; fetch it with `hf download clip`\n" in err
    record = json.loads((run / "evaluation/result.json").read_text())
    assert record["command"].startswith("sprint evaluate ") and "--count 3" in record["command"]
    assert record["left_out"].keys() == {"clip"} and len(record["columns"][0]["hash"]) == 64
    assert (
        record["protocols"]["fid"]["pictures"] == "3 built-in held-out scenes, fewer than the protocol's 600"
    )

    assert sprint(*argv, "--seed", "5", "--out", "other").code == 0
    code, out, _ = sprint("compare", "mini/evaluation", "other", "--out", "both.html")
    assert code == 0 and out.endswith("page: both.html\n") and "beware: seeds differ: " in out
    assert (here / "both.html").is_file()


def test_what_a_run_drew_is_not_drawn_again(sprint, here, run_folder, monkeypatch):
    """`sprint distill` ends with the evaluation that `sprint evaluate` of its folder makes, by its recipe."""
    monkeypatch.setattr(distance, "REFERENCE_SCENES", 20)
    run = shutil.copytree(run_folder, here / "mini")
    (run / "recipe.yaml").write_text(
        "evaluate: {prompts: 3, steps: [1, 2], teacher_steps: 2, guidance_scale: 4}\n"
    )
    (run / "evaluation").mkdir()
    (run / "evaluation" / "student_1.json").write_text("{}")  # as earlier versions left one
    at_the_end = evaluate_run(Path("mini"), "sprint distill mini")
    assert [column.title for column in at_the_end.columns] == [
        "student, 1 step", "student, 2 steps", "teacher, 2 steps", "undistilled, 1 step",
    ]  # fmt: skip
    assert list(at_the_end.protocols) == ["scenes", "fid", "teacher-fid", "diversity", "pace"]
    assert at_the_end.settings["guidance"] == "4"
    written = read_result(run / "evaluation").columns
    monkeypatch.setattr("sprint.sample.generate.Generator.pictures", lambda *_: pytest.fail("drawn again"))
    code, out, err = sprint("evaluate", "mini", "--metrics", "scenes")
    assert code == 0 and "page: mini/evaluation/index.html" in out, err
    again = read_result(run / "evaluation")
    assert again.columns == written  # figures of the run's other metrics stay
    assert again.command.splitlines() == ["sprint distill mini", "sprint evaluate mini --metrics scenes"]
    drawn = len(list((run / "evaluation" / "pictures").rglob("*.png")))
    assert drawn == 4 * (3 + 3)  # and three more seeds of one prompt


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
        (["MODEL", "--guidance", "nan"], "--guidance nan: give a number from 0 to 1,000"),
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
