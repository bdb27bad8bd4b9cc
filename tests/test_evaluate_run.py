"""Which metric looks at what, and the figures it makes of it."""

import json
import math
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sprint.data.scenes import BACKGROUND, render, scene
from sprint.data.source import HELD_OUT_SEED, held_out_scenes
from sprint.errors import NotHereError, SprintError
from sprint.evaluate import distance, metrics, run
from sprint.evaluate.distance import FrechetDistance
from sprint.evaluate.metrics import Choices, ClipScore, Drawn, GenEvalScore, SceneScore, mean_of, seen_words
from sprint.evaluate.prompts import Prompts, named_prompts, needed, reference_prompts, scene_prompts, spread
from sprint.evaluate.result import Column, Figure, Measured, Shot, read_result, share, write_result
from sprint.evaluate.run import Options, evaluation_name, find_models, model_hash
from sprint.evaluate.scenes import Seen
from sprint.evaluate.store import Drawing, PictureStore

pytest_plugins = "tests.evaluate_fixtures"
BLANK = np.full((64, 64, 3), BACKGROUND, np.uint8)


def options(model, tmp_path, **changes) -> Options:
    choices = Choices(kept=tmp_path / "kept", **changes.pop("choices", {}))
    return Options(str(model), tmp_path / "out", choices, **changes)


def drawn(tmp_path, prompts: Prompts, pictures) -> Drawn:
    store = PictureStore(tmp_path / "drawn", Drawing("a" * 64, (1.5, 0.0), 4.5, 64))
    for shot, picture in zip(prompts.shots, pictures, strict=True):
        store.write(shot, picture)
    return Drawn(prompts, store, "student, 1 step")


# ---- models -----------------------------------------------------------------------------------------


def test_a_run_brings_its_teacher(run_folder, tmp_path):
    student, teacher = find_models(options(run_folder, tmp_path))
    assert (student.role, student.steps, student.small) == ("student", (1, 2, 4), True)
    assert (teacher.role, teacher.steps, teacher.path) == ("teacher", (20,), str(run_folder / "teacher"))
    (alone,) = find_models(options(run_folder / "teacher", tmp_path, steps=[3, 5, 3]))
    assert (alone.role, alone.steps) == ("teacher", (3, 5))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": [1, 5]}, "--steps 5: .* is a student and takes 1 to 4"),
        ({"steps": [0]}, "--steps 0"),
        ({"teacher": "STUDENT"}, "is a student .*; a teacher is needed here"),
    ],
)
def test_models_that_do_not_fit(run_folder, tmp_path, changes, words):
    student = str(run_folder / "student")
    changes = {key: student if value == "STUDENT" else value for key, value in changes.items()}
    with pytest.raises(SprintError, match=words):
        find_models(options(student, tmp_path, **changes))


def test_an_unfinished_run_says_so(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(SprintError, match="a run that has no student yet"):
        find_models(options(tmp_path, tmp_path))


def test_names(run_folder):
    assert evaluation_name(str(run_folder)) == "mini"
    assert evaluation_name(str(run_folder / "student")) == "mini-student"
    assert evaluation_name("owner/model") == "model" and evaluation_name("tiny") == "tiny"


@pytest.mark.parametrize("part", ["transformer/diffusion_pytorch_model", "text_encoder/model"])
def test_a_changed_weight_makes_another_hash(run_folder, tmp_path, part):
    copy = shutil.copytree(run_folder / "student", tmp_path / "copy")
    assert model_hash(str(copy)) == model_hash(str(run_folder / "student"))
    file = copy / f"{part}.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, file, {"format": "pt"})
    assert model_hash(str(copy)) != model_hash(str(run_folder / "student"))


def test_another_way_of_reading_prompts_makes_another_hash(run_folder, tmp_path):
    copy = shutil.copytree(run_folder / "student", tmp_path / "copy")
    settings = json.loads((copy / "sprint.json").read_text())
    settings["text"]["max_length"] = 81
    (copy / "sprint.json").write_text(json.dumps(settings))
    assert model_hash(str(copy)) != model_hash(str(run_folder / "student"))


# ---- prompts ----------------------------------------------------------------------------------------


def test_scenes_are_those_of_the_report():
    prompts = scene_prompts(7, seed=5)
    assert [s.prompt for s in prompts.shots] == [s.caption for s in held_out_scenes(7)]
    assert [s.seed for s in prompts.shots] == list(range(5, 12))
    assert "fewer than the protocol's 600" in prompts.words
    assert scene_prompts(None, 0).words == "600 built-in held-out scenes"


def test_prompts_of_a_text_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\n\n a <b> dog \n")
    assert named_prompts(str(file), None, 3).shots == [Shot("a fox", 3), Shot("a <b> dog", 4)]
    assert named_prompts(str(file), 1, 0).words == "1 of 2 prompts in prompts.txt"
    file.write_text("\n")
    with pytest.raises(SprintError, match="no prompt in it"):
        named_prompts(str(file), None, 0)
    with pytest.raises(SprintError, match="no such file or folder; or say scenes"):
        named_prompts(str(tmp_path / "missing"), None, 0)


def test_prompts_of_real_pictures(tmp_path):
    entries = {"b": {"category": "art", "prompt": "a fox"}, "a": {"category": "art", "prompt": "a dog"}}
    (tmp_path / "meta_data.json").write_text(json.dumps(entries))
    (tmp_path / "imgs" / "art").mkdir(parents=True)
    for key in entries:
        (tmp_path / "imgs" / "art" / f"{key}.jpg").touch()
    found = reference_prompts(tmp_path, None, 7)
    assert found.shots == [Shot("a fox", 7), Shot("a dog", 8)]
    assert found.words == "2 prompts of MJHQ-30K, fewer than the protocol's 30000"


def test_no_prompts_is_said_with_what_to_fetch():
    with pytest.raises(NotHereError, match="--reference FOLDER with MJHQ-30K"):
        needed(None)


def test_spread_is_even_and_whole_by_default():
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, None) == [0, 1, 2] and spread(3, 9) == [0, 1, 2]


# ---- metrics ----------------------------------------------------------------------------------------


def test_scene_score_with_a_known_answer(tmp_path):
    """Real scenes are right, blank pictures wrong: every third prompt is blank, so single objects and colours fail."""
    metric = SceneScore(Choices(kept=tmp_path, count=12))
    pictures = [BLANK if i % 3 == 0 else render(s.things) for i, s in enumerate(held_out_scenes(12))]
    found = metric.measure(drawn(tmp_path, metric.find(), pictures))
    assert found.figures["scene score"] == Figure(8 / 12, math.sqrt(8 / 12 * 4 / 12 / 12))
    assert {name: figure.value for name, figure in list(found.figures.items())[1:]} == {
        "single object": 0, "two object": 1, "counting": 1, "colors": 0, "position": 1, "color attr": 1,
    }  # fmt: skip
    assert found.verdicts.correct == [i % 3 != 0 for i in range(12)]
    assert found.verdicts.reasons[0] == "nothing" and found.verdicts.reasons[1] != "nothing"


def test_what_was_seen_in_words():
    seen = [Seen("circle", "red", 10.2, 20.4, 18.0), Seen(None, None, 50.0, 40.0, 9.0)]
    single, position = scene(HELD_OUT_SEED, 2).claim, scene(HELD_OUT_SEED, 4).claim
    assert single.category == "counting" and position.relation
    assert seen_words(seen, single) == "red circle; unclear scribble"
    assert seen_words(seen, position) == "red circle at 10, 20; unclear scribble at 50, 40"
    assert seen_words([], single) == "nothing"


def test_clip_score_is_the_mean_with_its_standard_error(tmp_path, monkeypatch):
    class Scorer:
        protocol = "fake"

        def __init__(self, name, device):
            self.name = name

        def __call__(self, pictures, prompts):
            return torch.tensor([float(len(prompt)) for prompt in prompts])

    monkeypatch.setattr(metrics, "ClipScorer", Scorer)
    monkeypatch.setattr(metrics, "AT_ONCE", 2)
    prompts = Prompts("prompts", "3 prompts", [Shot("a", 0), Shot("bb", 1), Shot("ccc", 2)])
    metric = ClipScore(Choices(kept=tmp_path, clip_model="mine"), prompts)
    metric.open()
    found = metric.measure(drawn(tmp_path, metric.find(), [BLANK] * 3))
    assert metric.scorer.name == "mine" and metric.protocol()["network"] == "fake"
    assert found.figures == {"CLIP score": Figure(2.0, 1 / math.sqrt(3), spec=".2f")}
    assert found.verdicts.scores == [1.0, 2.0, 3.0]


def test_fid_is_zero_against_the_same_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(distance, "REFERENCE_SCENES", 12)
    monkeypatch.setattr(distance, "REFERENCE_SEED", HELD_OUT_SEED)
    prompts = scene_prompts(12, 0)
    metric = FrechetDistance(Choices(kept=tmp_path), prompts)

    class Network:
        name = "mean colour"

        def __call__(self, pictures):
            return torch.from_numpy(pictures).float().mean((1, 2))

    monkeypatch.setattr(distance, "scene_features", lambda device: Network())
    metric.open()
    same = metric.measure(drawn(tmp_path, prompts, [render(s.things) for s in held_out_scenes(12)])).figures
    assert same["FID"].value == pytest.approx(0, abs=1e-9) and not same["FID"].higher
    other = metric.measure(
        drawn(tmp_path, prompts, [255 - render(s.things) for s in held_out_scenes(12)])
    ).figures
    assert other["FID"].value > 1000 and other["KID"].value > same["KID"].value
    assert (
        metric.protocol()["network"] == "mean colour"
        and "12 other real scenes" in metric.protocol()["against"]
    )


def test_fid_of_prompts_without_real_pictures_says_what_to_give(tmp_path):
    prompts = Prompts("prompts", "1 prompt", [Shot("a", 0)])
    with pytest.raises(NotHereError, match="give --reference"):
        FrechetDistance(Choices(kept=tmp_path), prompts).find()


def test_geneval_draws_four_of_each_and_averages_the_categories(tmp_path, monkeypatch):
    tasks = [
        {"tag": tag, "prompt": f"a photo of a {name}", "include": [{"class": name, "count": 1}]}
        for tag, name in (("single_object", "cat"), ("single_object", "dog"), ("colors", "bus"))
    ]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, tasks)))
    metric = GenEvalScore(Choices(kept=tmp_path, seed=10, geneval_metadata=str(file)))
    prompts = metric.find()
    assert [shot.seed for shot in prompts.shots] == list(range(10, 22))
    assert [shot.group for shot in prompts.shots] == ["single_object"] * 8 + ["colors"] * 4
    verdict = namedtuple("Verdict", "correct reason")
    metric.judge = lambda pictures, tasks: [verdict("cat" in t.prompt, f"no {t.tag}") for t in tasks]
    found = metric.measure(drawn(tmp_path, prompts, [BLANK] * 12))
    assert found.figures["single object"] == share(4, 8) and found.figures["colors"].value == 0
    assert found.figures["GenEval"].value == 0.25
    assert found.figures["GenEval"].error == pytest.approx(math.sqrt(0.25 / 8) / 2)
    assert found.verdicts.reasons[-1] == "no colors"
    few = GenEvalScore(Choices(kept=tmp_path, count=8, geneval_metadata=str(file))).find()
    assert len(few.shots) == 8 and few.words == "4 for each of 2 prompts of GenEval's 3"


def test_the_mean_of_figures():
    assert mean_of([Figure(1.0, 0.3), Figure(0.0, 0.4)]) == Figure(0.5, 0.25)


# ---- the whole --------------------------------------------------------------------------------------


class Fake:
    """A metric that counts pictures, or fails."""

    size = None

    def __init__(self, name, missing=None, problem=None):
        self.name, self.missing, self.problem, self.opened = name, missing, problem, 0

    def find(self):
        return Prompts("prompts", "2 prompts", [Shot("a dot", 0), Shot("two dots", 1)])

    def open(self):
        self.opened += 1
        if self.missing:
            raise NotHereError(self.missing)

    def protocol(self):
        return {"pictures": "2 prompts"}

    def measure(self, drawn):
        if self.problem:
            raise SprintError(self.problem)
        return Measured({"pictures": Figure(sum(len(b) for b in drawn.batches("counting")))})


@pytest.fixture
def fakes(monkeypatch):
    def use(*found):
        monkeypatch.setattr(run, "_make_metrics", lambda *_: list(found))

    return use


def test_what_is_missing_or_fails_is_left_out_and_the_others_are_measured(run_folder, tmp_path, fakes):
    fakes(Fake("fid", missing="fetch it"), Fake("scenes", problem="a picture is bad"), Fake("clip"))
    chosen = options(run_folder, tmp_path, metrics=["fid", "scenes", "clip"], steps=[1], command="sprint x")
    result = run.evaluate(chosen)
    assert result.left_out == {"fid": "fetch it", "scenes": "a picture is bad"}
    assert [(c.title, list(c.measured)) for c in result.columns] == [
        ("student, 1 step", ["clip"]),
        ("teacher, 20 steps", ["clip"]),
    ]
    assert result.columns[0].measured["clip"].figures["pictures"].value == 2
    assert result.recipe == "name: mini\n" and list(result.protocols) == ["clip"]
    assert read_result(tmp_path / "out").rows() == result.rows()
    for column in result.columns:
        assert len(list((tmp_path / "out" / column.folder).glob("*.png"))) == 2


def test_nothing_to_measure_draws_nothing(run_folder, tmp_path, fakes):
    fakes(Fake("fid", missing="fetch this"), Fake("clip", missing="fetch that"))
    with pytest.raises(SprintError, match="fetch this; fetch that"):
        run.evaluate(options(run_folder, tmp_path, metrics=["fid", "clip"]))
    assert not (tmp_path / "out").exists()


def test_the_second_time_nothing_is_drawn(run_folder, tmp_path, fakes, monkeypatch):
    fakes(Fake("clip"))
    chosen = options(run_folder / "student", tmp_path, metrics=["clip"], steps=[1])
    first = run.evaluate(chosen)
    monkeypatch.setattr("sprint.generate.Generator.pictures", lambda *_: pytest.fail("drawn again"))
    assert run.evaluate(chosen).columns == first.columns


def test_another_process_draws_its_share_and_opens_nothing(run_folder, tmp_path, fakes, monkeypatch):
    monkeypatch.setattr(run, "_agree", lambda left_out, place: left_out)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    metric = Fake("clip")
    fakes(metric)
    chosen = options(run_folder / "student", tmp_path, metrics=["clip"], steps=[1], batch_size=1)
    assert run.evaluate(chosen) is None and metric.opened == 0
    (picture,) = (tmp_path / "out").rglob("*.png")
    assert picture.name == Shot("two dots", 1).file and not list((tmp_path / "out").glob("*.json"))


def test_scenes_need_pictures_of_their_size(run_folder, tmp_path):
    copy = shutil.copytree(run_folder / "student", tmp_path / "large")
    settings = json.loads((copy / "sprint.json").read_text()) | {"size": 128}
    (copy / "sprint.json").write_text(json.dumps(settings))
    with pytest.raises(SprintError, match=r"scenes: reads scenes of 64 px, and .*large draws 128 px"):
        run.evaluate(options(copy, tmp_path, metrics=["scenes"]))
    small, large = (find_models(options(model, tmp_path)) for model in (run_folder / "student", copy))
    usual = options(copy, tmp_path)
    assert run._metric_names(usual, small) == ["scenes", "fid", "clip", "latency"]
    assert run._metric_names(usual, large) == ["fid", "clip", "geneval", "latency"]
    assert run._main_prompts(usual, small).name == "scenes" and run._main_prompts(usual, large) is None


def test_latency_holds_students_against_the_teacher(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "ROUNDS", 2)
    monkeypatch.setattr(metrics, "WARMUP", 0)
    monkeypatch.setattr(metrics, "BATCHES", (1, 2))
    monkeypatch.setattr(run, "TEACHER_DEFAULT", (6,))
    result = run.evaluate(options(run_folder, tmp_path, metrics=["latency"], steps=[1]))
    student, teacher = (column.measured["latency"].figures for column in result.columns)
    parts = sum(student[f"{part}, ms"].value for part in metrics.PARTS)
    assert parts > 0 and student["latency, ms"].value < teacher["latency, ms"].value
    assert student["faster than the teacher"].value > 1 and "faster than the teacher" not in teacher
    assert not list((tmp_path / "out").rglob("*.png"))


# ---- result.json ------------------------------------------------------------------------------------


def test_a_figure_that_is_not_finite_stays_one(tmp_path):
    column = Column("student", 1, "m", measured={"fid": Measured({"FID": Figure(math.nan, higher=False)})})
    path = write_result(tmp_path, run.Result("x", [column], protocols={"fid": {}}))
    assert "NaN" not in path.read_text()
    (figure,) = read_result(path).rows()[("fid", "FID")]
    assert math.isnan(figure.value) and str(figure) == "–"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "columns": 3}', '{"format": 0}'])
def test_what_is_no_result_is_refused(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(SprintError, match=r"result\.json"):
        read_result(tmp_path)
