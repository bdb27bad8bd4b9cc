"""The ablations' list, the rule by which a row agrees with the paper, and what is kept between starts."""

import json
import math
import os
import signal
import sys
import time
from dataclasses import make_dataclass, replace
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from safetensors.numpy import load_file

from sprint.base.errors import Diverged, SprintError
from sprint.data.encode.make import make_cache
from sprint.recipe.load import load_recipe, recipe_text
from sprint.recipe.schema import Data, Recipe
from sprint.train.loop import Interrupted
from sprint.train.run import Run
from tools.ablations import __main__ as ablations
from tools.ablations import answers as ablation_answers
from tools.ablations import jobs as ablation_jobs
from tools.ablations import run as ablation_run
from tools.ablations.__main__ import Workers
from tools.ablations.jobs import (
    Job,
    Settings,
    is_done,
    plan,
    steps_done,
)
from tools.ablations.methods import GROUPS, METHODS, chosen
from tools.ablations.rows import (
    AGREES,
    BASE_SEEDS,
    DISAGREES,
    WITHIN_NOISE,
    Group,
    Measured,
    Paper,
    Row,
    compare,
    expectations,
    in_words,
    verdict,
    verdicts,
)

ROOT = Path(__file__).parents[3]
FEW = (
    *("adapt.steps=0", "adapt.start=ones", "adapt.batch_size=4"),
    *(
        "distill.steps=2",
        "distill.batch_size=4",
        "evaluate.prompts=6",
        "evaluate.steps=[1, 2]",
        "evaluate.teacher_steps=2",
        "log_every=1",
    ),
)


# ---- the list ---------------------------------------------------------------------------------------


def test_every_row_is_a_recipe_that_changes_what_it_says():
    settings = Settings()
    for group in GROUPS:
        assert sum(row.is_base for row in group.rows) == 1
        base = settings.student(group.base, 0)
        for row in group.rows:
            job = settings.student(row, 0)
            assert (job.key == base.key) == row.is_base, row.label


@pytest.mark.slow
def test_the_plan_runs_the_base_once_per_seed_and_each_stage_1_once():
    jobs = plan(GROUPS, Settings())
    kinds = [job.kind for job in jobs.values()]
    # two of the paper's rows, with and without QK-norm; sparse time brings its own; tiny-paper's; tiny's
    assert kinds.count("teacher") == 4
    seeds = range(BASE_SEEDS)
    assert kinds.count("sparse") == len(seeds)
    bases = {Settings().student(Row("base"), seed).key for seed in seeds}
    assert len(bases) == len(seeds) and bases <= jobs.keys()
    assert all(job.teacher in jobs for job in jobs.values() if job.kind == "student")
    quick = plan(GROUPS, Settings(quick=True))
    assert {job.recipe.seed for job in quick.values()} == {0}
    steps = {job.recipe.distill.steps for job in quick.values() if job.kind == "student"}
    assert max(steps) == 160 * max(row.updates for group in GROUPS for row in group.rows) and 80 in steps


def test_stage_1_is_shared_by_what_it_does_not_depend_on():
    settings = Settings()
    base, qk = settings.teacher(Row("base")), settings.teacher(Row("off", ("adapt.qk_norm=false",)))
    assert settings.teacher(Row("LADD", ("distill.consistency.weight=0",))).key == base.key != qk.key
    assert Settings(quick=True).teacher(Row("base")).key == base.key
    assert Settings(overrides=("adapt.steps=7",)).teacher(Row("base")).key != base.key


def test_a_new_field_of_recipes_leaves_old_runs_their_names():
    later = make_dataclass("Later", [("more", int, 0)], bases=(Recipe,))
    recipe = load_recipe(ablation_jobs.recipe_file("ablations"))
    fields = vars(recipe)
    assert ablation_jobs.digest(later(**fields)) == ablation_jobs.digest(recipe)
    assert ablation_jobs.digest(later(**fields, more=1)) != ablation_jobs.digest(recipe)
    assert ablation_jobs.digest(replace(recipe, name="other")) == ablation_jobs.digest(recipe)


def test_half_the_steps_are_another_run():
    settings = Settings()
    half = settings.student(Row("half", updates=0.5), 0)
    assert half.recipe.distill.steps * 2 == settings.student(Row("whole"), 0).recipe.distill.steps


def test_another_teacher_text_or_data_has_a_cache_of_its_own(monkeypatch):
    plain = Settings().cache_folder
    assert plain.parent == ablation_jobs.RUNS and plain.name.startswith("cache-11520-")
    assert Settings(overrides=("data.size=64", "distill.ema_decay=0.9")).cache_folder == plain
    long = Settings(overrides=("text.max_length=40",)).cache_folder
    other = Settings(overrides=("data.seed=1",)).cache_folder
    monkeypatch.setattr(ablation_jobs, "weights_digest", lambda teacher: "another")
    assert len({long, other, plain, Settings().cache_folder}) == 4


def test_another_teacher_of_the_same_name_is_another_run(tmp_path):
    recipe = replace(load_recipe("tiny"), teacher=str(tmp_path))
    keys = []
    for weights in (b"one", b"other"):
        ablation_jobs.weights_digest.cache_clear()
        (tmp_path / "weights.safetensors").write_bytes(weights)
        keys.append(ablation_jobs.digest(recipe))
    assert len({*keys}) == 2


def test_a_method_is_scored_on_its_way_and_at_its_end():
    paper, *_ = METHODS.rows
    job = Settings().student(paper, 0)
    steps = job.recipe.distill.steps
    assert job.points == (steps // 4, steps // 2)
    assert (
        Settings().student(replace(paper, points=()), 0).key == job.key
    )  # it changes nothing that is trained


def test_sharpening_begins_after_a_share_of_the_students_updates():
    row = Row("late", ("distill.matching.weight=0.1", "distill.matching.updates=2"), warmup=0.5)
    recipe = Settings(overrides=("distill.steps=80",)).student(row, 0).recipe
    assert recipe.distill.adversarial.warmup_steps == 10  # a quarter of the updates are the student's
    assert not row.is_base and not replace(row, overrides=()).is_base


@pytest.mark.parametrize("override", ["seed=1", "name=mine", "data.path=elsewhere"])
def test_what_the_list_sets_itself_is_refused(override, capsys):
    assert ablations.main([override, "--page"]) == 2
    assert capsys.readouterr().err.startswith(f"ablations: {override}: the list sets")


def test_groups_are_chosen_by_key():
    assert [group.key for group in chosen(["time", "losses"])] == ["losses", "time"]
    assert chosen([]) == GROUPS


# ---- the rule ---------------------------------------------------------------------------------------


def seeds(*values: float) -> Measured:
    return Measured(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))


def one(value: float, error: float) -> Measured:
    return Measured({0: value}, {0: error})


@pytest.mark.parametrize(
    "row, expected, word",
    [
        (seeds(2.0, 2.1, 1.9), 1, AGREES),
        (seeds(2.0, 2.1, 1.9), -1, DISAGREES),
        (seeds(0.5, 0.6, 0.4), 1, DISAGREES),
        (seeds(0.5, 0.6, 0.4), -1, AGREES),
        (seeds(1.05, 1.16, 0.94), 1, AGREES),  # seed by seed .05, .06, .04: 4.303 · .0058 = .025
        (seeds(1.05, 0.95, 1.15), 1, WITHIN_NOISE),  # the same values under other seeds: .05, -.15, .25
        (seeds(1.24, 1.24, 1.24), 1, WITHIN_NOISE),  # 4.303 · 0.0577 = 0.248
        (seeds(1.26, 1.26, 1.26), 1, AGREES),
        (seeds(2.0, 2.1, 1.9), 0, WITHIN_NOISE),  # the paper sees no difference
    ],
)
def test_verdict_over_seeds(row, expected, word):
    assert verdict(row, seeds(1.0, 1.1, 0.9), expected) == word


def test_seeds_are_paired_by_their_number():
    """Seed 0 failed: what is left is compared with the same seeds of the base."""
    row = Measured({1: 1.15, 2: 0.96}, {1: 0.0, 2: 0.0})
    difference, interval = compare(row, seeds(1.0, 1.1, 0.9))
    assert difference == pytest.approx(0.055) and interval == pytest.approx(12.706 * 0.005)


def test_a_single_seed_is_no_surer_than_its_pictures_or_the_seeds_of_the_base():
    base = seeds(1.0, 1.1, 0.9)  # spread 0.1, error 0.058
    assert verdict(one(1.52, 0.01), base, 1) == AGREES  # 4.303 · hypot(0.1, 0.058) = 0.497
    assert verdict(one(1.48, 0.01), base, 1) == WITHIN_NOISE
    assert verdict(one(1.98, 0.2), base, 1) == WITHIN_NOISE  # 4.303 · 0.2 · √(1 + 1/3) = 0.994
    assert verdict(one(2.00, 0.2), base, 1) == AGREES
    single = one(1.0, 0.1)
    assert verdict(one(1.29, 0.1), single, 1) == AGREES  # 1.96 · hypot(0.1, 0.1) = 0.277
    assert verdict(one(1.27, 0.1), single, 1) == WITHIN_NOISE


def test_the_same_difference_with_every_seed_is_no_certainty():
    """A few pictures of hundreds: scores are counts."""
    base, row = (
        Measured({0: 0.4, 1: 0.4}, {0: 0.028, 1: 0.028}),
        Measured({0: 0.41, 1: 0.41}, {0: 0.028, 1: 0.028}),
    )
    assert verdict(row, base, 1) == WITHIN_NOISE


def test_a_base_of_one_seed_does_not_hide_the_spread_of_the_row():
    row, base = Measured({1: 1.0, 2: 2.0}, {1: 0.01, 2: 0.01}), one(1.0, 0.01)
    difference, interval = compare(row, base)
    assert difference == 0.5 and interval == pytest.approx(12.706 * 0.7071 * math.sqrt(1.5), rel=1e-3)


def test_signs_come_from_the_papers_figures_or_its_words():
    base = Row("base", paper=Paper(8.0, 28.0))
    worse = Row("x", ("seed=1",), paper=Paper(9.0, 27.0))
    assert expectations(worse, base) == {"fid": 1, "score": -1}
    mixed = Row("x", ("seed=1",), paper=Paper(9.0, 28.5))
    assert expectations(mixed, base) == {"fid": 1, "score": 1}
    assert expectations(Row("x", ("seed=1",), worse=True, louder=True), base) == {
        "fid": 1,
        "score": -1,
        "norm": 1,
    }
    assert expectations(base, base) == expectations(Row("x", ("seed=1",)), base) == {}
    assert expectations(replace(worse, comparable=False), base) == {}


def test_rows_that_are_not_the_papers_get_no_verdict():
    without = {row.label: row.paper for group in GROUPS for row in group.rows if not row.comparable}
    assert without == {"sCM only": None, "one scale, 4.5": Paper(9.23, 27.15)}


def test_verdicts_are_of_measures_that_both_rows_have():
    found = verdicts(
        {"fid": 1, "score": -1}, {"fid": seeds(2, 2, 2)}, {"fid": seeds(1, 1, 1), "score": seeds(1)}
    )
    assert found == {"fid": AGREES}


def test_verdicts_in_words():
    assert in_words({"fid": AGREES, "score": AGREES}) == "agrees"
    words = in_words({"fid": WITHIN_NOISE, "score": WITHIN_NOISE, "norm": DISAGREES})
    assert words == "disagrees in gradient norm; within the noise in FID and scene score"


# ---- what is kept between starts --------------------------------------------------------------------

# A worker that notes its start and does `job`'s work in two halves; the file "half" is its checkpoint.
FAKE = """
import json, pathlib, signal, sys, time
root, key = pathlib.Path(sys.argv[1]), sys.argv[2]
with open(root / "starts", "a") as starts: starts.write(key + "\\n")
folder = root / key
if "bad" in key: sys.exit("no such teacher")
if not (folder / "half").exists():
    (folder / "half").write_text("")
    if (root / "slow").exists(): time.sleep(60)
(folder / "result.json").write_text("{}")
"""


@pytest.fixture
def fake(tmp_path):
    """Starts a list of made-up jobs under fake workers, one at a time.  -> troubles"""
    recipe = load_recipe(ablation_jobs.recipe_file("ablations"))

    def start(*keys: str, at_once: int = 1) -> dict[str, str]:
        teachers = {key.partition("@")[2] for key in keys} - {""}
        jobs = {key: Job(key, recipe, "teacher") for key in sorted(teachers)}
        for key in keys:
            jobs[key] = Job(key, recipe, "student", key.partition("@")[2])
        return Workers(jobs, tmp_path, at_once, [sys.executable, "-c", FAKE, str(tmp_path)]).run()

    return start


def started(root: Path) -> list[str]:
    return (root / "starts").read_text().split()


def test_a_second_start_makes_no_run(fake, tmp_path):
    assert fake("a@t", "b@t") == {}
    assert started(tmp_path) == ["t", "a@t", "b@t"]  # the teacher first
    assert fake("a@t", "b@t") == {}
    assert len(started(tmp_path)) == 3
    assert fake("a@t", "c@t") == {}
    assert started(tmp_path)[3:] == ["c@t"]


def test_a_failed_job_is_told_and_the_rest_goes_on(fake, tmp_path):
    troubles = fake("a@bad", "b@t", at_once=2)
    assert troubles["bad"] == "no such teacher (exit code 1)"
    assert troubles["a@bad"] == "its teacher is not there: no such teacher (exit code 1)"
    assert is_done(Job("b@t", load_recipe(ablation_jobs.recipe_file("ablations")), "student"), tmp_path)


def test_ctrl_c_stops_the_workers_and_the_same_command_goes_on(fake, tmp_path):
    (tmp_path / "slow").touch()

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not (tmp_path / "a" / "half").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    timer = Timer(0.1, interrupt)
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fake("a")
    timer.join()
    assert time.monotonic() - began < 40  # the worker was ended, not waited for
    assert not (tmp_path / "a" / "result.json").exists()
    (tmp_path / "slow").unlink()
    assert fake("a") == {}
    assert started(tmp_path) == ["a", "a"]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Settings of two steps with a cache, and real statistics of a few scenes."""
    settings = Settings(overrides=FEW, root=tmp_path_factory.mktemp("ablations"))
    recipe = load_recipe(ablation_jobs.recipe_file("ablations"), [f"data.path={settings.cache_folder}", *FEW])
    recipe.data = Data(size=64)
    make_cache(recipe, settings.cache_folder, settings.cache_samples, dtype="fp32")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ablation_run, "REFERENCE_SCENES", 80)
        ablation_run.real_statistics(settings.root)
        yield settings


@pytest.fixture
def fresh_engine():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_from_stage_1_to_its_scores(few, monkeypatch, fresh_engine):
    row = Row("longer", ("distill.steps=3",), points=(0.5,))
    teacher, job = few.teacher(row), few.student(row, 0)
    assert ablation_run.work(teacher, few.root) == 0
    assert set(read(few, teacher)["scores"]) == {"2"}
    with monkeypatch.context() as patched:
        patched.setattr(Run, "distill", stop_by(Interrupted("saved")))
        assert ablation_run.work(job, few.root) == ablation_jobs.INTERRUPTED
    assert not is_done(job, few.root) and steps_done(job, few.root) == 0
    assert ablation_run.work(job, few.root) == 0
    assert is_done(job, few.root) and steps_done(job, few.root) == 3
    found = read(few, job)
    assert found["failed"] is None and set(found["scores"]) == {"1", "2"}
    assert 0 <= found["scores"]["2"]["score"] <= 1 and found["scores"]["2"]["fid_error"] > 0
    assert found["norms"]["grad_norm"] > 0
    (point,) = found["points"]
    assert point["step"] == 2 and 0 < point["thread_seconds"] < found["training"]["thread_seconds"]
    assert 0 <= point["score"] <= 1 and point["fid_error"] > 0
    halfway, end = (
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        for folder in (ablation_run.point_folder(few.root / job.key, 2), few.root / job.key / "student")
    )
    assert halfway.keys() == end.keys() and any((halfway[name] != end[name]).any() for name in end)
    with np.load(few.root / job.key / ablation_run.PICTURES) as pictures:
        assert pictures["2"].shape == (6, 64, 64, 3)
    assert found["network"].startswith("scene network ") and found["made_by"]["versions"]["torch"]

    with (
        monkeypatch.context() as patched
    ):  # the same student, looked at by another rule or through another network
        patched.setattr(Run, "distill", stop_by(AssertionError("trained again")))
        result = few.root / job.key / ablation_jobs.RESULT
        result.write_text(json.dumps(found | {"reader": "another"}))
        assert not is_done(job, few.root)
        result.write_text(json.dumps(found | {"network": "another", "scores": {"2": {}}}))
        assert not is_done(job, few.root) and ablation_run.work(job, few.root) == 0
    assert read(few, job)["scores"] == found["scores"] and read(few, job)["network"] == found["network"]


def test_a_changed_default_does_not_take_over_old_runs(tmp_path):
    job = Settings(root=tmp_path).student(Row("base"), 0)
    folder = tmp_path / job.key
    folder.mkdir()
    (folder / ablation_jobs.RESULT).write_text("{}")
    assert is_done(job, tmp_path)  # of before there were recipes beside results
    now = replace(job.recipe, needs="", log_every=99)
    (folder / "recipe.yaml").write_text(recipe_text(now).replace("  student_times: []\n", ""))
    assert is_done(job, tmp_path)  # a key that came later
    (folder / "recipe.yaml").write_text(recipe_text(replace(now, timeout=5)))
    assert not is_done(job, tmp_path)
    with pytest.raises(SprintError, match=r"made with other settings \(timeout\); delete it"):
        ablation_run.work(job, tmp_path)


def test_training_that_stops_for_good_is_a_result(few, monkeypatch, fresh_engine):
    row = Row("wild", ("distill.optimizer.lr=1",))
    assert ablation_run.work(few.teacher(row), few.root) == 0
    monkeypatch.setattr(Run, "distill", stop_by(Diverged("20 updates in a row")))
    job = few.student(row, 0)
    assert ablation_run.work(job, few.root) == 0
    assert is_done(job, few.root) and read(few, job)["failed"] == "20 updates in a row"
    group = Group("g", "G", "claim", (Row("base"), Row("wild", row.overrides, worse=True)))
    (answer,) = ablation_answers.collect([group], few)
    assert answer.outcome(answer.lines[1]) == "1 of 1 runs stopped: agrees"
    assert answer.words(answer.lines[1]) == [AGREES]


def test_other_troubles_are_no_result(few, monkeypatch, fresh_engine):
    row = Row("full disk", ("distill.optimizer.lr=0.5",))
    assert ablation_run.work(few.teacher(row), few.root) == 0
    monkeypatch.setattr(Run, "distill", stop_by(SprintError("cannot write: No space left on device")))
    with pytest.raises(SprintError, match="No space left"):
        ablation_run.work(few.student(row, 0), few.root)
    assert not is_done(few.student(row, 0), few.root)


def test_students_of_a_stage_1_that_failed_are_not_trained(few, monkeypatch, fresh_engine):
    row = Row("off", ("adapt.qk_norm=false",))
    with monkeypatch.context() as patched:
        patched.setattr(Run, "adapt", stop_by(Diverged("20 updates in a row")))
        assert ablation_run.work(few.teacher(row), few.root) == 0
    assert ablation_run.work(few.student(row, 0), few.root) == 0
    assert read(few, few.student(row, 0))["failed"] == "stage 1: 20 updates in a row"


def stop_by(error: Exception):
    def stop(self, log):
        raise error

    return stop


def read(settings: Settings, job: Job) -> dict:
    return json.loads((settings.root / job.key / ablation_jobs.RESULT).read_text())
