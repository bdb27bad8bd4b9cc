"""Weights that are not finite, or that never moved, leave no run."""

import math
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from sprint.base.errors import Diverged, SprintError
from sprint.base.names import resolve
from sprint.data.batching import encode
from sprint.engine import checkpoint
from sprint.models.families import load_family
from sprint.sample.generate import StudentGenerator
from sprint.train.distill import DistillStage
from sprint.train.log import RunLog
from sprint.train.loop import Checkpoints, Rhythm, train
from sprint.train.run import Run, check_moved
from sprint.weights.export import export_student, export_teacher
from sprint.weights.folder import INDEX_FILE, is_export
from tests.sample.test_generate import TEXT_WIDTH, mini_family
from tests.tiny import LATENT, same, snapshot, tiny_batch, tiny_network, tiny_null, tiny_recipe
from tests.train.test_loop import Squares, make_stage

G = 0  # a step of the generator


@pytest.fixture(scope="module")
def family():
    return mini_family()


@pytest.fixture
def stage(engine) -> DistillStage:
    return DistillStage(tiny_recipe(), engine, tiny_network(), tiny_null(), LATENT)


def loop(stage, engine, family, folder, save_every: int = 1, log_every: int = 1000) -> None:
    encoded, rhythm = partial(encode, family=family), Rhythm(save_every, log_every)
    found = Checkpoints.find(folder / "checkpoints", engine)
    with RunLog(folder, {"adapt": 6, "distill": 6}) as log:
        train(stage, Squares(), encoded, engine, log, found, rhythm)


def break_at(stage, step: int, value: float) -> None:
    """From that step's update on one weight is `value`."""
    update = stage.update

    def wrapped(number, batch):
        parameter = next(iter(stage.updaters().values())).trained.parameters.values()
        if number == step:
            next(iter(parameter)).data.view(-1)[0] = value
        return update(number, batch)

    stage.update = wrapped


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("log_every", [1, 1000])
def test_the_run_stops_and_names_the_last_good_update_and_checkpoint(
    engine, family, tmp_path, value, log_every
):
    """In the log's rhythm, or before a checkpoint is written, whichever comes first."""
    stage = make_stage("adapt", engine, family)
    break_at(stage, 3, value)
    with pytest.raises(
        Diverged, match=r"after update 4; the last good update was number 3;.*adapt-3$"
    ) as error:
        loop(stage, engine, family, tmp_path, log_every=log_every)
    assert "nothing is exported" in str(error.value)
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == ["000002-adapt-2", "000003-adapt-3"]


def test_a_run_that_never_moved_is_no_result(engine, family, tmp_path):
    stage = make_stage("adapt", engine, family)
    update = stage.update
    stage.update = lambda step, batch: update(step, batch._replace(latent=batch.latent * math.nan))
    with pytest.raises(Diverged, match="none of the 6 updates had a finite gradient"):
        loop(stage, engine, family, tmp_path, save_every=100)
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_the_average_takes_no_weights_that_are_not_finite(stage):
    stage.update(G, tiny_batch())
    before = {name: tensor.clone() for name, tensor in stage.ema.shadow.items()}
    stage.generator.trained.optimizer.param_groups[0]["lr"] = 1e308
    stage.update(G, tiny_batch())
    assert stage.generator.broken_at == 2 and same(before, stage.ema.shadow)
    with pytest.raises(Diverged, match="after update 2; the last good update was number 1"):
        stage.check()


def test_a_checkpoint_that_is_not_finite_is_refused(engine, stage, tmp_path):
    next(iter(stage.generator.trained.parameters.values())).data.view(-1)[0] = math.nan
    saver = checkpoint.Saver(tmp_path)
    saver.save("distill-1", stage.tensors(), {"stage": stage.facts()})
    saver.wait()
    other = DistillStage(tiny_recipe(), engine, tiny_network(), tiny_null(), LATENT)
    path = checkpoint.latest(tmp_path)
    with pytest.raises(SprintError, match=r"checkpoint: 1 of .* weights are not finite"):
        other.load(partial(checkpoint.read_tensors, path), checkpoint.read_facts(path)["stage"])


@pytest.mark.parametrize("student", [True, False])
def test_nothing_that_is_not_finite_is_exported(family, tmp_path, student):
    network = tiny_network(guidance_embeds=student, caption_channels=TEXT_WIDTH)
    network.proj_out.bias.data[0] = math.nan
    words = "out is not written: 1 of .* proj_out.bias .1 of 4 values"
    with pytest.raises(SprintError, match=words):
        if student:
            export_student(tmp_path / "out", network, None, family, {})
        else:
            export_teacher(tmp_path / "out", network, family, {})
    assert not list(tmp_path.iterdir())


# ---- what counts as finished ----------------------------------------------------------------------------


def test_an_empty_student_is_not_finished_and_something_else_is_in_the_way(tmp_path):
    (tmp_path / "student").mkdir()
    assert not is_export(tmp_path / "student") and not is_export(tmp_path / "none")
    (tmp_path / "student/notes.txt").write_text("mine")
    with pytest.raises(SprintError, match="holds something that is no exported model"):
        is_export(tmp_path / "student")
    (tmp_path / "student" / INDEX_FILE).write_text("{}")
    assert is_export(tmp_path / "student")


def test_a_run_looks_whether_its_student_is_whole(engine, tmp_path):
    run = Run.__new__(Run)
    run.folder, run.engine = tmp_path, engine
    (tmp_path / "student").mkdir()
    assert not run._exists("student")


# ---- drawing ------------------------------------------------------------------------------------------


def draw(family, network) -> None:
    from sprint.models.view import TrigFlowView

    StudentGenerator(TrigFlowView(network, 1.0), family, 16).pictures(["a dot", "a line"], [0, 1], 1)


def test_values_that_are_not_finite_make_no_picture(family):
    network = tiny_network(guidance_embeds=True, caption_channels=TEXT_WIDTH)
    draw(family, network)
    network.proj_out.bias.data.fill_(3e38)
    network.proj_out.weight.data.mul_(1e38)
    with pytest.raises(
        SprintError, match=r"the network gives values that are not finite .* for 2 of 2 .*'a dot'"
    ):
        draw(family, network)


@pytest.mark.parametrize("part", ["text encoder", "autoencoder"])
def test_parts_that_give_no_finite_values_are_named(part):
    family = mini_family()
    module = family.text_encoder if part == "text encoder" else family.autoencoder
    before = snapshot(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(math.nan)
    assert not same(before, snapshot(module))
    with pytest.raises(SprintError, match=f"the {part} gives values that are not finite"):
        draw(family, tiny_network(guidance_embeds=True, caption_channels=TEXT_WIDTH))


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_part_whose_weights_are_not_finite_is_not_loaded(tmp_path, part):
    folder = shutil.copytree(resolve("tiny"), tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    name, weight = next((name, weight) for name, weight in weights.items() if weight.is_floating_point())
    weight.view(-1)[-1] = math.nan
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(SprintError, match=f"model: {part}: 1 of .* not finite .*{name}"):
        load_family(str(folder))


@pytest.mark.parametrize("by", [0.0, 1e-6])
def test_a_student_that_is_its_teacher_bit_for_bit_never_moved(family, tmp_path, by):
    teacher, student = tiny_network(), tiny_network(guidance_embeds=True)
    export_teacher(tmp_path / "teacher", teacher, family, {})
    student.load_state_dict(teacher.state_dict(), strict=False)
    with torch.no_grad():
        student.proj_out.bias[-1] += by
    if by:
        check_moved(student, tmp_path / "teacher")
        return
    with pytest.raises(Diverged, match=r"never moved; nothing is exported: raise distill.optimizer.lr"):
        check_moved(student, tmp_path / "teacher")
