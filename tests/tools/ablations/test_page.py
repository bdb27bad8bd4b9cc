"""What `make ablations` writes of its runs: figures, table, page, pictures."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from sprint.lab.reader import RULES
from tools.ablations import __main__ as ablations
from tools.ablations import answers as ablation_answers
from tools.ablations import jobs as ablation_jobs
from tools.ablations import page as ablation_page
from tools.ablations import run as ablation_run
from tools.ablations.jobs import Settings
from tools.ablations.rows import (
    AGREES,
    BETTER,
    WITHIN_NOISE,
    Group,
    Paper,
    Row,
)


def finish(settings: Settings, row: Row, seed: int, score: float, fid: float, one_step: float = 1.0) -> None:
    """What a run leaves, made up; FID at 1 step is `one_step` times the others."""
    folder = settings.root / settings.student(row, seed).key
    folder.mkdir(parents=True)
    scores = {str(n): {"score": score, "score_error": 0.02, "fid": fid, "fid_error": 0.1} for n in (1, 2, 4)}
    scores["1"]["fid"] *= one_step
    norms = {"grad_norm": 3.0, "grad_norm_decades": 0.01}
    result = {
        "key": folder.name,
        "seed": seed,
        "failed": None,
        "scores": scores,
        "norms": norms,
        "seconds": 1.0,
        "reader": RULES,
    }
    (folder / ablation_jobs.RESULT).write_text(json.dumps(result))
    rows = [
        {
            "stage": "distill",
            "step": 2 * i + 1,
            "phase": "G",
            "seconds": i,
            "grad_norm": 2.0 + i,
            "tangent_norm": 1.0,
        }
        for i in range(4)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    pictures = np.full((6, 64, 64, 3), 90, np.uint8)
    np.savez(folder / ablation_run.PICTURES, **dict.fromkeys(("1", "2", "4"), pictures))


@pytest.fixture
def made_up(tmp_path) -> tuple[Group, Settings]:
    base, other = (
        Row("base", seeds=2, paper=Paper(8.0, 28.0)),
        Row("<b>other</b>", ("distill.ema_decay=0.9",), paper=Paper(9.0, 27.0)),
    )
    missing = Row("missing", ("distill.steps=3",))
    group = Group("time", "<script>", "a & b", (other, base, missing))
    settings = Settings(root=tmp_path)
    finish(settings, base, 0, 0.40, 1.0)
    finish(settings, base, 1, 0.44, 1.1)
    finish(settings, other, 0, 0.41, 2.8)
    teacher = tmp_path / settings.teacher(base).key
    teacher.mkdir()
    here = {"commit": "abc", "versions": {"torch": "2"}, "device": "a CPU"}
    result = {"failed": None, "scores": {}, "seconds": 5.0, "network": "scene network 1", "made_by": here}
    (teacher / ablation_jobs.RESULT).write_text(json.dumps(result))
    return group, settings


def test_results_are_written_with_means_spread_and_verdicts(made_up, tmp_path, capsys):
    group, settings = made_up
    files = ablation_page.write_results([group], settings, 2, tmp_path / "out", tmp_path / "page")
    assert {file.name for file in files} == {
        *("ablations.json", "ablations.html", "table.md", "ablations.png", "ablations-gradients.svg")
    }
    record = json.loads((tmp_path / "out" / "ablations.json").read_text())
    other, base, missing = record["groups"][0]["rows"]
    assert base["means"]["2"]["score"]["mean"] == pytest.approx(0.42)
    assert base["means"]["2"]["score"]["spread"] == pytest.approx(0.0283, abs=1e-4)
    assert other["verdicts"] == {"fid": AGREES, "score": WITHIN_NOISE}
    assert missing["outcome"] == "not run" and missing["runs"] == [None]
    assert record["made_by"] == {
        "commit, versions and device not recorded; feature network not recorded": 3,
        "commit abc; torch 2; a CPU; scene network 1": 1,
    }
    assert record["thread_seconds"] == 3.0 + 5.0  # with stage 1
    table = (tmp_path / "page" / "table.md").read_text()
    assert "| 0.420 ± 0.028 | 1.050 ± 0.071 |" in table and table.strip() in capsys.readouterr().out


def test_the_page_escapes_what_it_is_given(made_up, tmp_path):
    group, settings = made_up
    ablation_page.write_results([group], settings, 2, tmp_path / "out", tmp_path / "page")
    page = (tmp_path / "page" / "ablations.html").read_text()
    drawing = (tmp_path / "out" / "ablations-gradients.svg").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "a &amp; b" in page
    ElementTree.fromstring(drawing)
    for text in (page, drawing):
        assert "<b>other" not in text and "&lt;b&gt;other&lt;/b&gt;" in text


def test_a_page_of_what_is_not_there_yet(tmp_path, capsys):
    """--page runs nothing."""
    assert ablations.main(["--page", "--only", "time", "--runs", str(tmp_path)]) == 0
    assert sorted(file.name for file in (tmp_path / "part").iterdir()) == [
        *("ablations.html", "ablations.json", "table.md")
    ]
    assert capsys.readouterr().out.count("| not run |") == 2


def test_a_row_without_its_base(tmp_path):
    settings, row = Settings(root=tmp_path), Row("other", ("distill.ema_decay=0.9",), worse=True)
    finish(settings, row, 0, 0.4, 1.0)
    (answer,) = ablation_answers.collect([Group("g", "G", "claim", (Row("base"), row))], settings)
    assert answer.outcome(answer.lines[1]) == "base not run"


def test_what_is_ours_is_better_or_worse_at_its_own_number_of_steps(tmp_path):
    settings, base = Settings(root=tmp_path), Row("base", seeds=2)
    rows = (
        base,
        *(Row(name, (f"distill.ema_decay={decay}",), 2) for name, decay in (("a", 0.5), ("b", 0.6))),
    )
    for row, one_step in zip(rows, (10.0, 1.0, 20.0), strict=True):
        for seed in range(2):
            finish(settings, row, seed, 0.40, 5.0, one_step)
    (answer,) = ablation_answers.collect([Group("g", "G", "", rows, steps="1", ours=True)], settings)
    of_base, better, worse = answer.lines
    assert answer.verdicts(better) == {"fid": BETTER, "score": WITHIN_NOISE}
    assert answer.outcome(better) == "better in FID; within the noise in scene score"
    assert answer.outcome(worse) == "worse in FID; within the noise in scene score"
    assert answer.outcome(of_base) == "base" and answer.words(better) == []  # no word about the paper
    files = ablation_page.write_results([answer.group], settings, 1, tmp_path / "out", tmp_path / "page")
    assert "ablations-one-step.png" in {file.name for file in files}
    assert ablation_page.IN_ONE_STEP in (tmp_path / "page" / "ablations.html").read_text()


def test_only_a_whole_list_goes_to_the_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "ROOT", tmp_path / "repository")
    assert ablations.main(["--page", "--runs", str(tmp_path / "runs")]) == 0
    assert (tmp_path / "runs" / "ablations.json").exists() and not (tmp_path / "repository").exists()
    monkeypatch.setattr(ablations, "is_done", lambda job, root: True)
    assert ablations.main(["--page", "--runs", str(tmp_path / "runs")]) == 0
    assert (tmp_path / "repository" / "tools" / "results" / "ablations.json").exists()


def test_a_wrong_command_is_one_line(capsys):
    assert ablations.main(["--jobs", "0"]) == 2
    assert capsys.readouterr().err == "ablations: --jobs 0: give at least 1\n"
    for command in (["distil.steps=3"], ["distil.steps=3", "--page"]):
        assert ablations.main(command) == 2
        assert "no such key" in capsys.readouterr().err
