"""metrics.jsonl survives kills and resumes; the log says nothing it was not asked to say."""

import json
import os
import sys
import types

import pytest

from sprint.base.errors import SprintError
from sprint.train.log import METRICS, RunLog, read_metrics, truncate_metrics

TOTALS = {"adapt": 4, "distill": 6}


def train(folder, stage, first, last, phase="flow", **options):
    with RunLog(folder, TOTALS, **options) as log:
        log.begin(stage, first)
        for step in range(first + 1, last + 1):
            log.advance(phase, samples=8)
            log.write(step, phase, {"loss": step / 10, "grad_norm": 1.5})


def steps(folder):
    return [(row["stage"], row["step"]) for row in read_metrics(folder / METRICS)]


def test_a_line_holds_stage_step_phase_seconds_and_the_numbers(tmp_path):
    train(tmp_path, "adapt", 0, 2)
    first, second = read_metrics(tmp_path / METRICS)
    assert 0 <= first.pop("seconds") <= second.pop("seconds") < 5
    assert first == {"stage": "adapt", "step": 1, "phase": "flow", "loss": 0.1, "grad_norm": 1.5}
    assert second["step"] == 2


def test_parts_of_the_update_are_milliseconds_beside_the_numbers(tmp_path):
    with RunLog(tmp_path, TOTALS) as log:
        log.begin("distill", 0)
        log.write(1, "G", {"loss": 0.5}, {"teacher": 12.34567, "other": 0.25})
    (row,) = read_metrics(tmp_path / METRICS)
    assert (row["loss"], row["ms_teacher"], row["ms_other"]) == (0.5, 12.346, 0.25)


def test_every_line_is_on_disk_at_once(tmp_path):
    with RunLog(tmp_path, TOTALS) as log:
        log.begin("adapt", 0)
        log.write(1, "flow", {"loss": 0.5})
        assert steps(tmp_path) == [("adapt", 1)]


def test_resume_leaves_no_doubles(tmp_path):
    train(tmp_path, "adapt", 0, 4)
    train(tmp_path, "distill", 0, 5, phase="G")
    train(tmp_path, "distill", 3, 6, phase="G")
    assert steps(tmp_path) == [("adapt", n) for n in range(1, 5)] + [("distill", n) for n in range(1, 7)]


def test_an_earlier_stage_resumed_drops_the_later_one(tmp_path):
    train(tmp_path, "adapt", 0, 4)
    train(tmp_path, "distill", 0, 5, phase="G")
    train(tmp_path, "adapt", 2, 3)
    assert steps(tmp_path) == [("adapt", 1), ("adapt", 2), ("adapt", 3)]


def test_a_half_written_last_line_is_passed_over_and_then_gone(tmp_path):
    path = tmp_path / METRICS
    train(tmp_path, "adapt", 0, 2)
    with path.open("a") as file:
        file.write('{"stage": "adapt", "step": 3, "lo')
    assert steps(tmp_path) == [("adapt", 1), ("adapt", 2)]
    train(tmp_path, "adapt", 2, 3)
    assert steps(tmp_path) == [("adapt", 1), ("adapt", 2), ("adapt", 3)]


def test_a_spoilt_line_elsewhere_is_passed_over_with_a_word(tmp_path, caplog):
    train(tmp_path, "adapt", 0, 3)
    path = tmp_path / METRICS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "nonsense\n", lines[2]]))
    assert steps(tmp_path) == [("adapt", 1), ("adapt", 3)]
    assert "1 damaged lines are passed over, the first is 2" in caplog.text


def test_truncation_returns_what_stays_and_leaves_no_scrap(tmp_path):
    train(tmp_path, "adapt", 0, 4)
    kept = truncate_metrics(tmp_path / METRICS, "adapt", 2)
    assert [row["step"] for row in kept] == [1, 2]
    assert read_metrics(tmp_path / METRICS) == kept
    assert [file.name for file in tmp_path.iterdir()] == [METRICS]


def test_no_file_is_no_metrics(tmp_path):
    assert read_metrics(tmp_path / METRICS) == []
    assert truncate_metrics(tmp_path / METRICS, "adapt", 0) == []
    assert not (tmp_path / METRICS).exists()


def test_seconds_count_on_after_a_resume(tmp_path):
    row = {"stage": "adapt", "step": 1, "phase": "flow", "seconds": 100.0, "loss": 1.0}
    (tmp_path / METRICS).write_text(json.dumps(row) + "\n")
    train(tmp_path, "adapt", 1, 2)
    assert 100 <= read_metrics(tmp_path / METRICS)[1]["seconds"] < 105


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with RunLog(tmp_path, TOTALS) as log:
        log.begin("adapt", 0)
        log.write(1, "flow", {"loss": float("nan"), "grad_norm": float("inf")})
    (row,) = read_metrics(tmp_path / METRICS)
    assert (row["loss"], row["grad_norm"]) == (None, None)


def test_a_metric_may_not_take_the_name_of_a_field(tmp_path):
    with RunLog(tmp_path, TOTALS) as log:
        log.begin("adapt", 0)
        with pytest.raises(ValueError, match="step"):
            log.write(1, "flow", {"step": 3.0})


def test_only_the_main_process_writes(tmp_path, capsys):
    train(tmp_path, "adapt", 0, 2, main_process=False)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_the_bar_shows_stage_phase_losses_and_speed(tmp_path, capsys):
    train(tmp_path, "distill", 0, 6, phase="G")
    shown = capsys.readouterr().err
    for part in ("2/2 distill G", "6/6", "loss 0.6", "samples/s", "left"):
        assert part in shown
    assert "grad_norm" not in shown


def test_samples_per_second_is_samples_over_time(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 5.0])
    with RunLog(tmp_path, TOTALS) as log:
        log.begin("adapt", 0)
        monkeypatch.setattr("sprint.train.log.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
        assert log.samples_per_second is None
        for _ in range(4):
            log.advance("flow", samples=10)
        assert log.samples_per_second == pytest.approx(30 / 5)


def test_wandb_missing_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SprintError, match=r"pip install sprint-distill\[track\]"):
        RunLog(tmp_path, TOTALS, wandb=True)


def test_wandb_is_offline_unless_said_otherwise(tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(define_metric=lambda *a, **k: None, log=logged.append, finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **settings: run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "unset")  # so that the test's end restores what was there
    monkeypatch.delenv("WANDB_MODE")
    train(tmp_path, "adapt", 0, 1, wandb=True)
    assert os.environ["WANDB_MODE"] == "offline"
    assert logged == [{"adapt/step": 1, "adapt/flow/loss": 0.1, "adapt/flow/grad_norm": 1.5}]
