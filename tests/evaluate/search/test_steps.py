"""Step lists: the search itself on a known landscape, the verdict, what is kept, what is adopted."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from diffusers import SanaSprintPipeline

from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.cli.search_steps import add_search_steps
from sprint.evaluate.metrics.gaussian import GaussianStatistics
from sprint.evaluate.result import Figure, share
from sprint.evaluate.search import judge
from sprint.evaluate.search.adopt import adopt
from sprint.evaluate.search.greedy import candidates, greedy_search
from sprint.evaluate.search.judge import Judge, Judged, judged_by_fid, paired_error
from sprint.evaluate.search.lists import (
    BATCH,
    Found,
    Search,
)
from sprint.evaluate.search.steps import search_steps
from sprint.evaluate.search.table import table
from sprint.lab.series import CONFIRM_SEED, SEARCH_SEED
from sprint.maths.schedule import student_times
from sprint.sample.generate import StudentGenerator
from sprint.sample.load import load_generator
from sprint.weights.export import export_student
from sprint.weights.settings import read_settings
from tests.sample.test_generate import SIZE, levels_apart, mini_family, mini_student

START = (1.5708, 1.1781, 0.7854, 0.3927, 0.0)


@pytest.fixture
def student(tmp_path):
    """64 pixels, random weights."""
    network = mini_student()
    network.register_to_config(sample_size=16)
    return export_student(tmp_path / "run" / "student", network, None, mini_family(max_length=80), {})


# ---- the search on a known landscape -------------------------------------------------------------------


def test_candidates_lie_between_their_neighbours():
    every = [times[2] for times in candidates(START, 2, 0.2, everywhere=True)]
    assert every == [0.4, 0.6, 0.8, 1.0]
    near = candidates((1.5708, 1.0, 0.95, 0.0), 1, 0.1, everywhere=False)
    assert near == [(1.5708, 1.1, 0.95, 0.0)]


@pytest.mark.parametrize("goal", [(1.3, 1.1, 0.6), (0.9, 0.75, 0.15)])
def test_search_finds_the_top_of_a_hill(goal):
    calls = []

    def score(times):
        calls.append(times)
        return -sum(abs(t - g) for t, g in zip(times[1:-1], goal, strict=True))

    best = greedy_search(START, (0.2, 0.1, 0.05), score)
    assert best[0] == START[0] and best[-1] == 0
    assert best[1:-1] == pytest.approx(goal, abs=0.026)
    assert all(times == tuple(sorted(times, reverse=True)) for times in calls)


def test_of_equal_lists_the_first_stays():
    assert greedy_search(START, (0.2, 0.1), lambda times: 0.5) == START


@pytest.mark.parametrize("steps", [2, 3, 4])
@pytest.mark.parametrize("grid", [(0.2, 0.1, 0.05), (0.3,), (0.07, 0.02)])
def test_budget_is_never_passed(steps, grid):
    """The landscape that asks for most: every later list is better."""
    search, seen = Search("x", (steps,), prompts=BATCH + 1, grid=grid), {}
    greedy_search(tuple(student_times(steps)), grid, lambda times: seen.setdefault(times, len(seen)))
    assert len(seen) + 2 <= search.lists(steps)  # and both lists on fresh prompts
    assert search.calls == search.lists(steps) * steps * 2


# ---- the verdict ---------------------------------------------------------------------------------------


def found(default, best, error=0.02, higher=True):
    figures = Figure(default, error, higher), Figure(best, error, higher)
    return Found((1.5708, 1.3, 0.0), (1.5708, 1.1, 0.0), figures, figures, error)


@pytest.mark.parametrize(
    ("row", "holds"),
    [
        (found(0.5, 0.545), True),
        (found(0.5, 0.535), False),
        (found(0.5, 0.4), False),
        (found(2.0, 1.9, higher=False), True),
        (found(2.0, 2.1, higher=False), False),
        (dataclasses.replace(found(0.5, 0.55), best=(1.5708, 1.3, 0.0)), False),
    ],
)
def test_only_more_than_two_standard_errors_on_fresh_prompts_are_used(row, holds):
    assert row.holds is holds
    assert row.times == (row.best if holds else row.default)
    assert ("use it" in table({2: row})) is holds and ("the default stays" in table({2: row})) is not holds


def test_error_of_fid_is_that_of_fresh_samples():
    """Bootstrap against the spread over sets that were drawn anew."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randn(count, 4, generator=generator) + 0.5

    real = GaussianStatistics.of(draw(4000) - 0.5)
    fresh = [judged_by_fid(draw(200), real).figure for _ in range(40)]
    spread = np.std([figure.value for figure in fresh], ddof=1)
    assert 0.6 < np.mean([figure.error for figure in fresh]) / spread < 1.6
    assert not fresh[0].higher and fresh[0].value == pytest.approx(1.0, abs=0.5)


def test_error_of_a_difference_is_taken_picture_by_picture():
    """50 pictures that hold under both lists, 8 under the better one alone, 2 under the other: 0.05 ± 0.026, as
    McNemar has it; unpaired it would be ± 0.06."""
    better, worse = [1] * 50 + [1] * 8 + [0] * 2 + [0] * 60, [1] * 50 + [0] * 8 + [1] * 2 + [0] * 60
    judged = [Judged(share(sum(v), len(v)), tuple(v)) for v in (worse, better)]
    assert paired_error(*judged) == pytest.approx(math.sqrt((10 / 120 - 0.05**2) / 119), rel=1e-9)
    assert math.hypot(*(j.figure.error for j in judged)) > 0.06


def test_error_of_a_difference_of_fid_is_that_of_fresh_samples():
    """Two ways to draw the same pictures: what they share cancels."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randn(count, 4, generator=generator)

    real, pairs = GaussianStatistics.of(draw(4000)), []
    for _ in range(30):
        same, noise = draw(200), 0.1 * draw(200)
        pairs.append([judged_by_fid(x, real) for x in (same + 0.5, same + noise + 0.3)])
    spread = np.std([b.figure.value - a.figure.value for a, b in pairs], ddof=1)
    assert 0.6 < np.mean([paired_error(*pair) for pair in pairs]) / spread < 1.6
    assert spread < 0.7 * math.hypot(*(j.figure.error for j in pairs[0]))


# ---- with a student -------------------------------------------------------------------------------------


def landscape(self, times, seed):
    """In the place of drawing: best at 1.0; on fresh prompts too."""
    self.bar.update(len(times) - 1)
    value = round(0.9 - abs(times[1] - 1.0), 4)
    return Judged(Figure(value, 0.01), (value,) * 2)


def test_search_of_a_folder_goes_on_where_it_was(student, tmp_path, monkeypatch):
    measured = []

    def measure(self, times, seed):
        measured.append((times, seed))
        if len(measured) == 5:
            raise KeyboardInterrupt
        return landscape(self, times, seed)

    monkeypatch.setattr(Judge, "_measure", measure)
    search, out = Search(str(student), (2,), prompts=4), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        search_steps(search, out)
    rows = search_steps(search, out)
    assert rows[2].best == rows[2].times == (student_times(2)[0], 1.0, 0.0)
    assert len(measured) == len(set(measured)) + 1  # the one that was interrupted
    assert {seed for _, seed in measured} == {SEARCH_SEED, CONFIRM_SEED}
    assert [seed for _, seed in measured].count(CONFIRM_SEED) == 2
    record = json.loads((out / "search.json").read_text())
    assert record["steps"]["2"]["times"] == list(rows[2].best) and record["steps"]["2"]["holds"]

    count = len(measured)
    assert search_steps(search, out) == rows and len(measured) == count
    search_steps(dataclasses.replace(search, guidance=3.0), out)
    assert len(measured) > count + 5  # another question: nothing of it is known


def test_fid_is_searched_downwards(student, tmp_path, monkeypatch):
    def measure(self, times, series):
        value = abs(times[1] - 1.0)
        return Judged(Figure(value, 0.01, higher=False), (value,) * 2)

    monkeypatch.setattr(Judge, "_measure", measure)
    rows = search_steps(Search(str(student), (2,), "fid", prompts=4), tmp_path / "out")
    assert rows[2].times[1] == 1.0 and rows[2].gain == pytest.approx(0.3)


@pytest.mark.parametrize("objective", ["scenes", "fid"])
def test_figures_are_of_the_pictures(student, tmp_path, monkeypatch, objective):
    """A random student draws no scene; both objectives see that, and both series are drawn."""
    monkeypatch.setattr(judge, "REAL_SCENES", 80)
    drawn = []
    pictures = StudentGenerator.pictures
    monkeypatch.setattr(
        StudentGenerator,
        "pictures",
        lambda self, prompts, seeds, **named: (
            drawn.append((prompts, seeds)) or pictures(self, prompts, seeds, **named)
        ),
    )
    rows = search_steps(Search(str(student), (2,), objective, prompts=8, grid=(0.7,)), tmp_path / "out")
    figure = rows[2].confirmed[0]
    assert figure.value == 0 if objective == "scenes" else figure.value > 10
    assert math.isfinite(figure.error) and figure.higher is (objective == "scenes")
    (first, search_noise), (last, confirm_noise) = drawn[0], drawn[-1]
    assert first != last
    assert not {*search_noise} & {*confirm_noise} and not {*search_noise, *confirm_noise} & {*range(10**6)}


def test_half_a_line_of_a_killed_search_is_cut_off(student, tmp_path, monkeypatch):
    monkeypatch.setattr(Judge, "_measure", landscape)
    search, file = Search(str(student), (2,), prompts=4), tmp_path / "lists.jsonl"
    rows, before = search_steps(search, tmp_path), file.read_bytes()
    file.write_bytes(before[:-9])
    assert search_steps(search, tmp_path) == rows and file.read_bytes() == before


@pytest.mark.slow
def test_another_feature_network_begins_anew(student, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "REAL_SCENES", 80)
    search, seen = Search(str(student), (2,), "fid", prompts=8, grid=(0.7,)), []
    measure = Judge._measure
    monkeypatch.setattr(Judge, "_measure", lambda self, *place: seen.append(place) or measure(self, *place))
    search_steps(search, tmp_path)
    count = len(seen)
    search_steps(search, tmp_path)
    assert len(seen) == count
    network = judge.scene_features()
    network.name = "another"
    monkeypatch.setattr(judge, "scene_features", lambda device: network)
    search_steps(search, tmp_path)
    assert len(seen) == 2 * count


def test_known_lines_of_something_else_are_refused(student, tmp_path):
    (tmp_path / "lists.jsonl").write_text("no JSON\n")
    with pytest.raises(SprintError, match=r"lists\.jsonl: not what search-steps wrote"):
        search_steps(Search(str(student), (2,), prompts=2), tmp_path)


# ---- for later use ------------------------------------------------------------------------------------


def test_adopted_lists_are_used_here_and_in_diffusers(tmp_path):
    folder = export_student(tmp_path / "student", mini_student(), None, mini_family(), {})
    card = (folder / "README.md").read_text()
    own = (1.5708, 1.1, 0.6, 0.0)
    rows = {2: found(0.5, 0.5), 3: dataclasses.replace(found(0.5, 0.6), best=own)}
    assert adopt(folder, rows) == folder / "sprint.json"
    assert read_settings(str(folder)).times == (own,) and read_settings(str(folder)).size == SIZE
    student = load_generator(str(folder))
    assert student.times(3) == list(own) and student.times(2) == student_times(2)

    written = (folder / "README.md").read_text()
    assert written.startswith(card) and "- 3 steps: `1.5708,1.1,0.6,0`" in written
    code = written.split("```python")[-1].split("```")[0]
    pipeline = SanaSprintPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": SIZE, "width": SIZE, "use_resolution_binning": False, "guidance_scale": 4.5}
    settings |= {"max_sequence_length": 20, "complex_human_instruction": None, "output_type": "np"}
    names = {"pipeline": pipeline, "settings": settings, "torch": torch}
    exec(code, names)
    theirs = (names["picture"] * 255).round()
    assert levels_apart(theirs, student.pictures(["a red circle"], [0], 3)[0]) <= 1
    assert levels_apart(theirs, student.pictures(["a red circle"], [0], times=student_times(3))[0]) > 1

    adopt(folder, {3: found(0.5, 0.5)})  # a later search in which the default won
    assert read_settings(str(folder)).times == () and (folder / "README.md").read_text() == card


def test_adopting_where_there_are_no_links(tmp_path, monkeypatch):
    folder = export_student(tmp_path / "student", mini_student(), None, mini_family(), {})

    def refuse(source, target):
        raise OSError(1, "Operation not permitted", str(target))

    monkeypatch.setattr("sprint.evaluate.search.adopt.os.link", refuse)
    adopt(folder, {2: found(0.5, 0.6)})
    assert load_generator(str(folder)).times(2) == [1.5708, 1.1, 0.0]


def test_adopting_is_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = export_student(tmp_path / "student", mini_student(), None, mini_family(), {})
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    writes = iter([write_whole, None])

    def full_disk(path, data):
        write = next(writes)
        if write is None:
            raise OSError(28, "No space left on device", str(path))
        return write(path, data)

    monkeypatch.setattr("sprint.evaluate.search.adopt.write_whole", full_disk)
    with pytest.raises(SprintError, match="No space left on device; it is as it was"):
        adopt(folder, {2: found(0.5, 0.6)})
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_only_an_exported_folder_adopts(tmp_path):
    with pytest.raises(SprintError, match="no folder that sprint exported"):
        adopt(tmp_path, {2: found(0.5, 0.6)})


# ---- the verb ------------------------------------------------------------------------------------------


def call(*argv):
    import argparse

    parser = argparse.ArgumentParser()
    add_search_steps(parser.add_subparsers(required=True))
    args = parser.parse_args(["search-steps", *map(str, argv)])
    args.verb(args)


def test_verb_writes_tells_and_adopts(student, capsys, monkeypatch):
    monkeypatch.setattr(Judge, "_measure", landscape)
    call(student, "--steps", "2", "--prompts", "3", "--grid", "0.5,0.1", "--device", "cpu")
    out = capsys.readouterr().out
    assert "use it" in out and f"sprint sample {student} --times 1.5708,1,0" in out
    assert (student.parent / "search-steps" / "search.json").is_file()
    assert read_settings(str(student)).times == ()
    call(student, "--steps", "2", "--prompts", "3", "--grid", "0.5,0.1", "--device", "cpu", "--adopt")
    assert "adopted" in capsys.readouterr().out
    assert read_settings(str(student)).times == ((1.5708, 1.0, 0.0),)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps", "1"], "--steps 1: lists are searched for 2, 3 and 4 steps"),
        (["--steps", "2,5"], "--steps 5"),
        (["--steps", "2,2"], "each number once"),
        (["--steps", "two"], "--steps two: write numbers with commas"),
        (["--prompts", "1"], "--prompts 1: give at least 2"),
        (["--grid", "0.1,0.2"], "--grid 0.1,0.2: give spacings"),
        (["--grid", "2"], "--grid 2.0"),
        (["--grid", "nan"], "--grid nan"),
        (["--adopt"], "no folder that sprint exported"),
    ],
)
def test_wrong_arguments_are_one_line(argv, words, tmp_path):
    with pytest.raises(SprintError, match=words) as error:
        call(tmp_path, *argv)
    assert "\n" not in str(error.value)


def test_a_teacher_has_no_step_list(tmp_path):
    with pytest.raises(SprintError, match="tiny is a teacher; step lists are searched for students"):
        call("tiny", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_students_of_other_pictures_are_refused(tmp_path):
    folder = export_student(tmp_path / "student", mini_student(), None, mini_family(), {})
    with pytest.raises(SprintError, match=f"draws {SIZE} pixels; .* built-in scenes, 64 pixels"):
        search_steps(Search(str(folder), (2,)), tmp_path / "out")
