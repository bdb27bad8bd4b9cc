import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from safetensors.torch import load_file

from sprint.data.batch import Sample
from sprint.data.batching import encode
from sprint.engine import checkpoint
from sprint.train import run as run_module
from sprint.train.adapt import AdaptStage
from sprint.train.distill import DistillStage
from sprint.train.log import METRICS, TIME, RunLog, read_metrics
from sprint.train.loop import Checkpoints, Interrupted, Rhythm, due, stop_requests, train
from sprint.train.run import Run
from tests.sample.test_generate import TEXT_WIDTH as FAMILY_TEXT_WIDTH
from tests.sample.test_generate import mini_family
from tests.tiny import LATENT, same, snapshot, tiny_network, tiny_recipe


class Squares:
    """Random pictures of 16 pixels, so latents of 4 × 4; the position decides."""

    def samples(self, positions: range) -> list[Sample]:
        return [
            Sample(np.random.default_rng(p).integers(0, 256, (16, 16, 3), dtype=np.uint8), f"picture {p}")
            for p in positions
        ]

    def batched(self, batch_size: int) -> "Squares":
        return self


@pytest.fixture(scope="module")
def family():
    return mini_family()


def make_stage(kind: str, engine, family):
    network = tiny_network(caption_channels=FAMILY_TEXT_WIDTH)
    null = family.encode_prompts([""])
    if kind == "adapt":
        return AdaptStage(tiny_recipe(), engine, network, null)
    return DistillStage(tiny_recipe(), engine, network, null, LATENT)


def weights(stage) -> dict:
    if stage.name == "adapt":
        return snapshot(stage.network)
    heads = {f"heads.{key}": value for key, value in snapshot(stage.heads).items()}
    average = {f"average.{key}": value.clone() for key, value in stage.ema.shadow.items()}
    return snapshot(stage.student) | heads | average


def run(stage, engine, family, folder: Path, save_every: int = 100) -> float:
    with RunLog(folder, {"adapt": 6, "distill": 6}) as log:
        encoded, rhythm = partial(encode, family=family), Rhythm(save_every, log_every=1)
        return train(
            stage, Squares(), encoded, engine, log, Checkpoints.find(folder / "checkpoints", engine), rhythm
        )


def numbers(folder: Path) -> list[dict]:
    """The log without times."""
    rows = read_metrics(folder / METRICS)
    return [{k: v for k, v in row.items() if k != "seconds" and not k.startswith(TIME)} for row in rows]


def at_step(stage, where: int, action) -> None:
    """Call `action` in the middle of that step."""
    update = stage.update

    def wrapped(step, batch):
        if step == where:
            action()
        return update(step, batch)

    stage.update = wrapped


def interrupt(number=signal.SIGINT):
    os.kill(os.getpid(), number)


@pytest.fixture
def uninterrupted(engine, family, tmp_path, request):
    stage = make_stage(request.param, engine, family)
    run(stage, engine, family, tmp_path / "whole")
    return request.param, weights(stage), numbers(tmp_path / "whole")


BOTH = pytest.mark.parametrize("uninterrupted", ["adapt", "distill"], indirect=True)


@BOTH
@pytest.mark.parametrize("where", [0, 2, 3])
def test_an_interrupted_run_resumes_bit_for_bit(uninterrupted, where, engine, family, tmp_path):
    kind, whole, log = uninterrupted
    folder = tmp_path / "parts"
    first = make_stage(kind, engine, family)
    at_step(first, where, interrupt)
    with pytest.raises(Interrupted, match=f"saved {kind} step {where + 1} in"):
        run(first, engine, family, folder)
    assert len(numbers(folder)) == where + 1

    second = make_stage(kind, engine, family)
    run(second, engine, family, folder)
    assert same(weights(second), whole)
    assert numbers(folder) == log and len(log) == 6
    seconds = [row["seconds"] for row in read_metrics(folder / METRICS)]
    assert seconds == sorted(seconds)


def test_logged_updates_say_where_their_time_went(engine, family, tmp_path):
    run(make_stage("distill", engine, family), engine, family, tmp_path)
    rows = read_metrics(tmp_path / METRICS)
    common = ["data", "encode", "student", "features", "heads", "backward", "optimizer", "other"]
    for row, extra in ((rows[0], ["teacher"]), (rows[1], []), (rows[-1], [])):
        times = {name: value for name, value in row.items() if name.startswith(TIME)}
        assert sorted(times) == sorted(TIME + part for part in common + extra)
        assert all(value >= 0 for value in times.values()) and times["ms_backward"] > 0
    spent = sum(value for row in rows for name, value in row.items() if name.startswith(TIME)) / 1000
    assert spent < rows[-1]["seconds"] + 0.1  # nothing is counted twice


class Killed(BaseException):
    pass


@BOTH
def test_a_killed_run_loses_at_most_save_every_steps(uninterrupted, engine, family, tmp_path):
    kind, whole, log = uninterrupted
    folder = tmp_path / "parts"

    def die():
        while not list((folder / "checkpoints").glob("0*-4")):  # it is written in the background
            time.sleep(0.01)
        raise Killed

    first = make_stage(kind, engine, family)
    at_step(first, 5, die)
    with pytest.raises(Killed):
        run(first, engine, family, folder, save_every=2)
    assert checkpoint.read_facts(checkpoint.latest(folder / "checkpoints"))["step"] == 4

    second, seen = make_stage(kind, engine, family), []
    at_step(second, 4, lambda: seen.append("resumed"))
    at_step(second, 3, lambda: seen.append("repeated"))
    run(second, engine, family, folder, save_every=2)
    assert seen == ["resumed"]
    assert same(weights(second), whole)
    assert numbers(folder) == log


def test_a_signal_in_the_last_step_stops_the_run_too_and_nothing_is_left_to_do(engine, family, tmp_path):
    first = make_stage("adapt", engine, family)
    at_step(first, 5, lambda: interrupt(signal.SIGTERM))
    with pytest.raises(Interrupted, match="saved adapt step 6"):
        run(first, engine, family, tmp_path)
    second, steps = make_stage("adapt", engine, family), []
    second.update = lambda step, batch: steps.append(step)
    seconds = run(second, engine, family, tmp_path)
    assert steps == [] and seconds > 0
    assert same(weights(first), weights(second))


def test_the_second_signal_acts_at_once_and_handlers_return():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_requests() as asked:
        assert not asked
        interrupt()
        assert asked == [signal.SIGINT]
        interrupt(signal.SIGTERM)
        interrupt(signal.SIGTERM)
        assert asked == [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(
    ("every", "kinds", "logged"),
    [
        (1, 1, list(range(12))),
        (1, 2, list(range(12))),
        (2, 1, [0, 2, 4, 6, 8, 10]),
        (2, 2, [0, 1, 4, 5, 8, 9]),
        (5, 1, [0, 5, 10]),
        (5, 2, [0, 1, 10, 11]),
    ],
)
def test_one_update_of_a_kind_in_so_many_is_logged(every, kinds, logged):
    assert [step for step in range(12) if due(step, every, kinds)] == logged


# ---- the whole run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_folder(family, tmp_path_factory):
    """A random base teacher, sparse time, no QK-norm."""
    folder = tmp_path_factory.mktemp("teacher")
    network = tiny_network(qk_norm=False, caption_channels=FAMILY_TEXT_WIDTH)
    parts = family.tokenizer, family.text_encoder, family.autoencoder, network
    SanaPipeline(*parts, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    return folder


def whole_run(teacher_folder, root: Path, stage: str = "", where: int = -1, monkeypatch=None) -> Path:
    recipe = tiny_recipe()
    recipe.teacher = str(teacher_folder)
    recipe.adapt.steps = recipe.distill.steps = 3
    recipe.adapt.batch_size = recipe.distill.batch_size = 4
    the_run = Run(recipe, root)
    if stage:
        train_stage = the_run.train_stage

        def wrapped(a_stage, *rest):
            if a_stage.name == stage:
                at_step(a_stage, where, interrupt)
            train_stage(a_stage, *rest)

        the_run.train_stage = wrapped
    the_run.train()
    return the_run.folder


def exported(folder: Path) -> dict:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_a_run_stopped_in_each_stage_makes_the_student_of_an_uninterrupted_one(
    engine, teacher_folder, tmp_path, monkeypatch
):
    whole, starts = whole_run(teacher_folder, tmp_path / "whole"), []
    start = run_module.start_of_adaptation
    monkeypatch.setattr(run_module, "start_of_adaptation", lambda *of: starts.append(1) or start(*of))
    for stage, where in (("adapt", 1), ("adapt", 2), ("distill", 0)):  # step 2 is the last: the hand-over
        with pytest.raises(Interrupted):
            whole_run(teacher_folder, tmp_path / "parts", stage, where)
    stopped = tmp_path / "parts" / "test"
    assert (stopped / "teacher").exists() and not (stopped / "student").exists()
    whole_run(teacher_folder, tmp_path / "parts")
    for model in ("teacher", "student"):
        assert same(exported(whole / model), exported(stopped / model))
    assert numbers(whole) == numbers(stopped)
    assert [row["stage"] for row in numbers(whole)] == ["adapt"] * 3 + ["distill"] * 3
    assert not list((stopped / "checkpoints").iterdir())
    assert len(starts) == 1  # nothing is calibrated whose place a checkpoint takes
