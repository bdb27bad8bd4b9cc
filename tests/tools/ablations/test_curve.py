"""One-step score over thread-seconds: what is counted, drawn and said."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools.ablations import budget, curve
from tools.ablations import jobs as ablation_jobs
from tools.ablations import page as ablation_page
from tools.ablations.answers import collect
from tools.ablations.budget import Comparison, comparisons, kept_share
from tools.ablations.estimate import estimate, expected
from tools.ablations.jobs import Settings, plan
from tools.ablations.rows import Group, Row
from tools.ablations.seconds import thread_seconds

PAPER = Row("paper", (), 2, recipe="tiny-paper", points=(0.5,))
MORE = Row("<more>", ("distill.ema_decay=0.9",), 2, recipe="tiny-paper", points=(0.5,))
GROUP = Group("curve", "Methods", "", (PAPER, MORE), steps="1", ours=True)


# ---- what is counted --------------------------------------------------------------------------------


def rows(*updates: tuple[str, str, float]) -> list[dict]:
    """(stage, phase, seconds it took) -> lines of a log."""
    lines, now, steps = [], 0.0, {}
    for stage, phase, took in updates:
        now += took
        steps[stage] = steps.get(stage, 0) + 1
        lines.append({"stage": stage, "step": steps[stage], "phase": phase, "seconds": now})
    return lines


def test_an_update_that_compiles_counts_as_its_kinds_median():
    turns = [("distill", phase, took) for _ in range(4) for phase, took in (("G", 2.0), ("D", 1.0))]
    compiled = [("distill", "G", 32.0), ("distill", "D", 11.0), *turns]
    assert thread_seconds(rows(*compiled), "distill") == pytest.approx((5 * 2 + 5 * 1, 30 + 10))
    assert thread_seconds(rows(*turns, *compiled), "distill") == pytest.approx((9 * 3, 40))  # after a break
    assert thread_seconds(rows(*compiled), "distill", last=3) == pytest.approx((2 + 1 + 2, 40))


def test_a_stage_is_counted_from_the_end_of_the_one_before():
    log = rows(("adapt", "flow", 3.0), ("adapt", "flow", 3.0), ("distill", "G", 2.0), ("distill", "G", 2.5))
    assert thread_seconds(log, "adapt") == pytest.approx((6.0, 0.0))
    assert thread_seconds(log, "distill") == pytest.approx((4.5, 0.0))
    assert thread_seconds(log, "other") == (0.0, 0.0)


# ---- what is drawn and said -------------------------------------------------------------------------


def finish(settings: Settings, row: Row, seed: int, cost: float, halfway: float, end: float) -> None:
    """What a run leaves, made up: scores at 1 step; FID is a hundred times what a score lacks."""

    def scored(score: float) -> dict:
        return {"score": score, "score_error": 0.001, "fid": 100 * (1 - score), "fid_error": 0.01}

    folder = settings.root / settings.student(row, seed).key
    folder.mkdir(parents=True)
    result = {
        "key": folder.name,
        "seed": seed,
        "failed": None,
        "scores": {"1": scored(end)},
        "points": [{"step": 1, "thread_seconds": cost / 2} | scored(halfway)],
        "training": {"thread_seconds": cost, "left_out": 5.0},
        "norms": {"grad_norm": None},
        "seconds": cost + 1,
        "reader": ablation_jobs.RULES,
    }
    (folder / ablation_jobs.RESULT).write_text(json.dumps(result))


@pytest.fixture
def settings(tmp_path) -> Settings:
    made = Settings(root=tmp_path)
    for seed, wobble in enumerate((0.0, 0.01)):
        finish(made, PAPER, seed, 1000 + 20 * seed, 0.20 + wobble, 0.30 + wobble)
        finish(made, MORE, seed, 1200, 0.40 + wobble, 0.6 + 1.01 * wobble)
    return made


def test_the_picture_has_a_line_for_each_row_and_a_pale_one_for_each_seed(settings):
    (answer,) = collect([GROUP], settings)
    drawing = curve.drawing(answer)
    ElementTree.fromstring(drawing)
    assert "<more>" not in drawing and "&lt;more&gt;" in drawing
    for panel in drawing.split("aria-label")[1:]:
        assert [len(re.findall(f'"smooth line-{n}"', panel)) for n in (0, 1, 2)] == [1, 1, 0]
        assert [len(re.findall(f'"raw line-{n}"', panel)) for n in (0, 1)] == [2, 2]
    titles = re.findall(r"<title>paper: (\S+) at (\S+)</title>", drawing)
    assert titles == [("0.205", "505"), ("0.305", "1010"), ("79.5", "505"), ("69.5", "1010")]
    corners = re.search(r'"smooth line-1" points="(\S+),\S+ (\S+),', drawing)
    left, right = map(float, corners.groups())
    log_place = curve.line_chart({"": [(505, 1), (600, 1), (1200, 1)]}, "", "", log_x=True)
    _, there, _ = re.search(r'points="(\S+),\S+ (\S+),\S+ (\S+),', log_place).groups()
    assert (left, right) == (float(there), 506.0)


def test_what_the_curve_says(settings):
    (answer,) = collect([GROUP], settings)
    assert curve.as_rows(answer)[0] == (
        "paper",
        ["505", "0.205 ± 0.007", "79.5 ± 0.7", "1010", "0.305 ± 0.007", "69.5 ± 0.7"],
    )
    assert len(curve.head(answer)) == 7
    (sentence,) = curve.verdict_lines(answer)
    assert sentence == "At the end of training better than paper at 1 step: <more> (FID and scene score)."
    assert curve.cheapest(answer) == (
        "paper ends at a score of 0.305 after 1010 thread-seconds; as high were: <more> by 600."
    )


def test_what_stays_within_the_noise_is_said(settings, tmp_path):
    same = Row("same", ("distill.ema_decay=0.8",), 2, recipe="tiny-paper", points=(0.5,))
    finish(settings, same, 0, 900, 0.2, 0.31)
    finish(settings, same, 1, 900, 0.2, 0.30)
    (answer,) = collect([Group("curve", "Methods", "", (PAPER, same), steps="1", ours=True)], settings)
    (sentence,) = curve.verdict_lines(answer)
    assert (
        sentence == "At the end of training within the noise of paper at 1 step: same (FID and scene score)."
    )


def test_the_page_has_the_curve_its_table_and_its_sentences(settings, tmp_path):
    files = ablation_page.write_results([GROUP], settings, 1, tmp_path / "out", tmp_path / "page")
    assert "ablations-curve.svg" in {file.name for file in files}
    page = (tmp_path / "page" / "ablations.html").read_text()
    assert "&lt;more&gt; (FID and scene score)" in page and "<more>" not in page and 'class="curve"' in page
    record = json.loads((tmp_path / "out" / "ablations.json").read_text())
    moment = record["groups"][0]["rows"][1]["moments"][0]
    assert moment["share"] == 0.5 and moment["thread_seconds"] == {"0": 600.0, "1": 600.0}
    assert "| <more> | 600 | 0.405 ± 0.007 |" in (tmp_path / "page" / "table.md").read_text()


def test_without_runs_there_is_no_curve(tmp_path):
    (answer,) = collect([GROUP], Settings(root=tmp_path))
    assert curve.drawing(answer) == curve.cheapest(answer) == ""
    assert curve.verdict_lines(answer) == curve.as_rows(answer) == []


# ---- what it will take ------------------------------------------------------------------------------


def test_the_estimate_goes_by_the_runs_that_are_done(settings, tmp_path):
    jobs = {key: job for key, job in plan([GROUP], settings).items() if job.kind == "student"}
    words = estimate(jobs, settings.root, 2)
    assert (
        words == "4 runs, 4 done; about 0 s of a thread left, 0 s with 2 at once, by the pace of 4 runs here"
    )
    for seed in (0, 1):
        (settings.root / settings.student(MORE, seed).key / ablation_jobs.RESULT).unlink()
    left = 1001 + 1021  # as long as the other two, of as many samples, took
    assert f"about {left // 60} min {left % 60} s of a thread" in estimate(jobs, settings.root, 1)
    assert "an AMD EPYC's pace" in estimate(jobs, tmp_path / "elsewhere", 1)
    one = next(iter(jobs.values()))
    assert expected(one) > 0


def test_seeds_that_a_difference_needs():
    """2.571 · s / √6 < d <= 2.776 · s / √5: by the table of Student's t, for 5 and 4 degrees of freedom."""
    assert Comparison("", 1.10, 1.0, 3).needed() == 6
    assert Comparison("", -1.10, 1.0, 3).needed() == 6
    assert Comparison("", 1.25, 1.0, 3).needed() == 5
    assert Comparison("", 0.001, 1.0, 3).needed(most=50) is None


def test_the_chance_is_a_twentieth_for_nothing_and_half_at_the_seeds_needed():
    assert Comparison("", 0.0, 1.0, 3).chance(8, kept=0.0) == pytest.approx(0.05, abs=1e-6)
    assert Comparison("", 1e-9, 1.0, 10**9).chance(8, kept=1.0) == pytest.approx(0.05, abs=1e-3)
    assert Comparison("", 2.306 / 3, 1.0, 10**9).chance(9, kept=1.0) == pytest.approx(0.5, abs=0.05)


def test_differences_no_larger_than_their_errors_tell_nothing():
    noise = [Comparison("", sign * 0.5, 1.0, 4) for sign in (1, -1)]  # z = ±1
    assert kept_share(noise) == 0.0
    assert kept_share([Comparison("", 1.0, 1.0, 4)]) == pytest.approx(0.75)  # z = 2
    assert kept_share([*noise, Comparison("", 1000.0, 1.0, 4)]) == 0.0  # beyond doubt: says nothing of them


def test_the_budget_reads_what_the_list_writes(capsys):
    record = json.loads(Path(budget.RESULTS).read_text())
    assert len(comparisons(record)) == 22
    assert budget.main(["--seeds", "3"]) == 0
    assert "of 22 expected to leave the noise" in capsys.readouterr().out


def test_a_file_that_is_no_record_is_one_line(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text("{}")
    assert budget.main([str(file)]) == 2
    assert capsys.readouterr().err == f"budget: {file}: not a record of the ablations\n"
    assert budget.main([str(tmp_path / "none.json")]) == 2 and budget.main(["--seeds", "1"]) == 2
