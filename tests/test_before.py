"""What the code of commit 5d791ca wrote still opens: runs, caches, weights, evaluations, searches.

`tests/before/README.md` says what is in the archive and how it was made. The product is used by its commands
alone, so that this file knows nothing of where its modules lie.
"""

import json
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from sprint.cli.main import main

ARCHIVE = Path(__file__).parent / "before" / "made.tar.xz"
WRITTEN = 1_600_000_000  # seconds: when every file of the archive was last written
NETWORK = "transformer/diffusion_pytorch_model.safetensors"
CACHE = "mini.yaml data.kind=scenes data.path= --count 6 --shard-size 3 --dtype fp32 -o cached"
EVALUATE = "evaluate runs/mini/student --metrics scenes --steps 1,2 --count 2 --out evaluated"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with everything that was made before."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sprint(capsys):
    """`sprint("sample tiny …")` -> standard output and standard error; it must not fail."""

    def call(command: str) -> tuple[str, str]:
        capsys.readouterr()
        try:
            main(shlex.split(command))
        except SystemExit as end:
            pytest.fail(f"sprint {command}: code {end.code}: {capsys.readouterr().err}")
        return capsys.readouterr()

    return call


def as_it_was(*patterns: str) -> bool:
    """Whether there are files of each pattern, and none of them was written again."""
    groups = [[path for path in Path().glob(pattern) if path.is_file()] for pattern in patterns]
    return all(groups) and all(path.stat().st_mtime == WRITTEN for group in groups for path in group)


def rows(run: str) -> list[dict]:
    return [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]


def test_no_artifact_knows_the_machine_that_made_it():
    for path in filter(Path.is_file, Path().rglob("*")):
        for start in (b"/home/", b"/root/", b"/tmp/", b"/Users/"):
            assert start not in path.read_bytes(), f"{path} holds {start}"


# ---- runs ---------------------------------------------------------------------------------------------

# A loss is a mean over 4 latents of 4 × 16 × 16 numbers of order one, in float32, after up to 3 + 6 updates. Each
# update may add the rounding of such a sum, which grows with the root of its length.
ROUNDING, TERMS, UPDATES = 2.0**-23, 4 * 4 * 16 * 16, 9
TOLERANCE = ROUNDING * TERMS**0.5 * UPDATES


def assert_same_training(run: str, other: str) -> None:
    """The same losses in every update, and the same student but for rounding."""
    found, expected = rows(run), rows(other)
    assert len(expected) == UPDATES
    for row, wanted in zip(found, expected, strict=True):
        place = [row[key] for key in ("stage", "step", "phase")]
        assert place == [wanted[key] for key in ("stage", "step", "phase")]
        ours, theirs = ({k: v for k, v in r.items() if k.startswith("loss")} for r in (row, wanted))
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE), place
    weights, wanted = (load_file(Path("runs", name, "student", NETWORK)) for name in (run, other))
    assert weights.keys() == wanted.keys()
    apart = np.concatenate([(weights[key] - wanted[key]).ravel() for key in wanted])
    assert np.sqrt((apart**2).mean()) < TOLERANCE  # of weights of order one


@pytest.mark.parametrize(("run", "done"), [("early", 1), ("stopped", 3 + 4)])
def test_an_interrupted_run_goes_on_to_the_end_it_would_have_had(sprint, run, done):
    """`early` stopped in stage 1, `stopped` in stage 2: weights, moments, EMA and data come back."""
    kept = rows(run)
    _, err = sprint(f"distill mini.yaml name={run}")
    assert "damaged" not in err and "not the files" not in err  # as a checkpoint, and data, would be called
    assert len(kept) == done and rows(run)[:done] == kept  # not trained again: these have their old times
    assert_same_training(run, "mini")
    assert as_it_was("shards/[!.]*")
    assert not as_it_was(
        "shards/.sprint-*.npz"
    )  # an index of before does not know of KEY_ANY.json: made anew
    assert run == "early" or as_it_was("runs/stopped/teacher/**/*")


def test_a_finished_run_is_not_trained_or_drawn_again(sprint):
    command = "name=scored data.kind=cache data.path=cached evaluate.prompts=2 evaluate.steps=[1]"
    before = rows("scored")
    out, _ = sprint(f"distill mini.yaml {command} evaluate.teacher_steps=2")
    assert out == "report: runs/scored/report.html\nstudent: runs/scored/student\n"
    assert rows("scored") == before
    assert as_it_was("runs/scored/student/transformer/*", "runs/scored/teacher/**/*")
    # The teacher's times are computed, and the last bit of an arc tangent is the processor's.
    assert as_it_was("runs/scored/evaluation/student_1.*")


# ---- data ---------------------------------------------------------------------------------------------


def test_a_cache_is_whole_and_trains_as_it_did(sprint):
    assert sprint("cache mini.yaml -o cached --verify").out == "cached: 5 files as they were written\n"
    assert "; kept 2 shards by size" in sprint(f"cache {CACHE}").out
    sprint("distill mini.yaml name=anew data.kind=cache data.path=cached")
    assert_same_training("anew", "scored")
    assert as_it_was("cached/*.tar")


# ---- models -------------------------------------------------------------------------------------------


def test_a_student_draws_what_it_drew(sprint):
    sprint("sample runs/mini/student --prompt red --prompt blue --out again")
    for name in ("000000.png", "000001.png"):
        ours, theirs = (np.asarray(Image.open(Path(folder, name)), int) for folder in ("again", "pictures"))
        assert ours.shape == (64, 64, 3) and theirs.std() > 5
        assert np.abs(ours - theirs).max() <= 1  # a level of 255, where rounding falls on the other side


def test_a_teacher_is_converted_there_and_back(sprint):
    sprint("convert original.safetensors --cross-attention-heads 2 --time-scale sparse -o there")
    sprint("convert trigflow --to original -o back.safetensors")
    for new, old in (
        ("there/diffusion_pytorch_model.safetensors", "trigflow/diffusion_pytorch_model.safetensors"),
        ("back.safetensors", "original.safetensors"),
    ):
        ours, theirs = load_file(new), load_file(old)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


# ---- evaluations --------------------------------------------------------------------------------------


def result(folder: str) -> dict:
    return json.loads(Path(folder, "result.json").read_text())


def test_an_evaluation_draws_nothing_again(sprint):
    before = result("evaluated")
    sprint(EVALUATE)
    again = result("evaluated")
    assert as_it_was("evaluated/pictures/*/*.png")
    for each in (before, again):  # scored anew: the rule became stricter
        del each["protocols"]["scenes"]["reader"]
    depths = [column.pop("depth") for column in again["columns"]]  # it was not told then
    assert min(depths) > 0
    for key in ("columns", "sets", "used", "protocols", "left_out"):
        assert again[key] == before[key]


def test_figures_of_an_evaluation_stay_beside_later_ones(sprint):
    before = result("evaluated")
    sprint("evaluate runs/mini/student --metrics latency --steps 1 --out evaluated")
    (timed,) = result("evaluated")["columns"]
    assert timed["measured"].keys() == {"scenes", "latency"}
    assert timed["measured"]["scenes"] == before["columns"][0]["measured"]["scenes"]


def test_an_evaluation_is_compared_with_one_of_today(sprint):
    sprint("evaluate runs/mini/student --metrics scenes --steps 1 --count 2 --seed 5 --out today")
    out, _ = sprint("compare evaluated today --out both.html")
    assert "beware: seeds differ: " in out and out.endswith("page: both.html\n")
    assert "student, 2 steps" in out and Path("both.html").is_file()


def test_a_search_knows_the_lists_it_measured(sprint):
    before = json.loads(Path("searched/search.json").read_text())
    sprint("search-steps runs/mini/student --steps 2 --prompts 2 --grid 0.7 --out searched")
    assert as_it_was("searched/lists.jsonl")
    assert json.loads(Path("searched/search.json").read_text())["steps"] == before["steps"]
