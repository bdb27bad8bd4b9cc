"""Times as a metric of `sprint evaluate`. How fast anything is, no test asks."""

from types import SimpleNamespace

import pytest
import torch

from sprint.base.errors import NotHereError
from sprint.evaluate import models, run
from sprint.evaluate.metrics import latency as timing
from sprint.evaluate.metrics.latency import Timing, middle
from sprint.evaluate.metrics.stopwatch import Spread
from sprint.evaluate.prompts import scene_prompts
from sprint.evaluate.result import Column, Figure, Measured, read_result
from tests.evaluate.fixtures import Fake, options

pytest_plugins = "tests.evaluate.fixtures"


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "WARMUP", 0)
    monkeypatch.setattr(timing, "BATCHES", (1, 2))
    monkeypatch.setattr(models, "TEACHER_DEFAULT", (6,))


def test_latency_holds_students_against_the_teacher(run_folder, tmp_path, short):
    result = run.evaluate(options(run_folder, tmp_path, metrics=["latency"], steps=[1]))
    student, teacher = (column.measured["latency"].figures for column in result.columns)
    parts = sum(student[f"{part}, ms"].value for part in timing.SHOWN_PARTS)
    assert parts > 0 and student["latency, ms"].value < teacher["latency, ms"].value
    assert student["faster than the teacher"].value > 1 and "faster than the teacher" not in teacher
    assert not list((tmp_path / "out").rglob("*.png"))
    assert result.protocols["latency"]["prompts"] == "the first 2 of 600 built-in held-out scenes"


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried"), NotHereError("x")]
)
def test_a_device_that_fails_leaves_out_times_alone(run_folder, tmp_path, fakes, monkeypatch, error):
    seen = []

    def fails(*_):
        seen.append(read_result(tmp_path / "out").protocols.keys())  # everything else is on disk by then
        raise error

    fakes(Fake("clip"))
    monkeypatch.setattr(run, "time_columns", fails)
    chosen = options(run_folder / "student", tmp_path, metrics=["clip", "latency"], steps=[1])
    result = run.evaluate(chosen)
    assert seen == [{"clip"}] and list(result.protocols) == ["clip"]
    assert result.left_out == {"latency": str(error).split("\n")[0]}
    assert read_result(tmp_path / "out").left_out == result.left_out


def test_the_spread_is_told_in_words_where_it_is_larger_than_the_median():
    assert str(middle(Spread(0.016, 0.01, 0.02, 0.015, 0.018), 1000)) == "16.0 ± 1.5"
    assert str(middle(Spread(0.016, 0.01, 0.9, 0.015, 0.238), 1000)) == "16.0 (quartiles 15.0 to 238.0)"


# ---- beside FLUX-schnell ----------------------------------------------------------------------------


@pytest.fixture
def large(monkeypatch):
    """Models of 1024 px on a GPU, of which nothing is loaded; every call takes the figure's place in line."""
    monkeypatch.setattr(timing, "load_generator", lambda *_: None)
    monkeypatch.setattr(timing, "contender", lambda generator, steps, guidance: f"sana {steps}")
    flux = SimpleNamespace(name="FLUX-schnell", steps=4, size=1024, dtype=torch.bfloat16)
    monkeypatch.setattr(timing, "flux_contender", lambda device: flux)

    def measure(self, contenders, teacher):
        return [Measured({"place": Figure(i)}) for i in range(len(contenders))]

    monkeypatch.setattr(Timing, "measure", measure)
    model = models.Model("m", "student", (2,), 1024)
    columns = [Column("student", 2, "m", "f" * 64)]
    return lambda: timing.time_columns(
        Timing(scene_prompts(2, 0)), columns, [model], "cuda", torch.float32, 4.5
    )


def test_flux_has_a_column_with_its_own_size_and_dtype(large):
    student, flux = large()
    assert student.measured["latency"].figures["place"].value == 0
    assert (flux.title, flux.size, flux.dtype) == ("FLUX-schnell, 4 steps", 1024, "bf16")
    assert flux.measured["latency"].figures["place"].value == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NotHereError("FLUX-schnell left out: fetch it"), "FLUX-schnell left out: fetch it"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory\nat"), "FLUX-schnell left out: CUDA out of memory"),
    ],
)
def test_without_flux_the_others_are_timed_and_it_is_said(large, monkeypatch, caplog, error, words):
    def fails(device):
        raise error

    monkeypatch.setattr(timing, "flux_contender", fails)
    assert [column.title for column in large()] == ["student, 2 steps"]
    assert caplog.messages == [words]
