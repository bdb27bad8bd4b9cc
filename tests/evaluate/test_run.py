"""An evaluation from beginning to end: what is left out, what is kept, and what is written down."""

import json
import math
import shutil
from dataclasses import replace

import pytest

from sprint.base.environment import environment
from sprint.base.errors import NotHereError, SprintError
from sprint.evaluate import run
from sprint.evaluate.choices import (
    SMALL_BATCH,
    check_paths,
    chosen_metrics,
    main_prompts,
    usual_of_own_prompts,
)
from sprint.evaluate.metrics.metric import Choices
from sprint.evaluate.models import find_models
from sprint.evaluate.published import beside_columns
from sprint.evaluate.result import Column, Figure, Measured, Result, Shot, Verdicts, read_result, write_result
from tests.evaluate.fixtures import Fake, options

pytest_plugins = "tests.evaluate.fixtures"


# ---- the whole --------------------------------------------------------------------------------------


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
    monkeypatch.setattr("sprint.sample.generate.Generator.pictures", lambda *_: pytest.fail("drawn again"))
    assert run.evaluate(chosen).columns == first.columns


def test_what_nothing_changed_is_not_scored_again(run_folder, tmp_path, fakes, monkeypatch):
    """But with a new picture, another protocol or another column it is."""
    counted = []
    measure = Fake.measure
    monkeypatch.setattr(
        Fake, "measure", lambda self, drawn: counted.append(drawn.title) or measure(self, drawn)
    )
    fakes(Fake("clip"))
    chosen = options(run_folder / "student", tmp_path, metrics=["clip"], steps=[1])
    first = run.evaluate(chosen)
    again = run.evaluate(chosen)
    assert counted == ["student, 1 step"] and again.rows() == first.rows()
    assert again.protocols == first.protocols and again.used == first.used
    next((tmp_path / "out" / "pictures").rglob("*.png")).unlink()
    run.evaluate(chosen)
    assert len(counted) == 2
    monkeypatch.setattr(Fake, "protocol", lambda self: {"pictures": "2 other prompts"})
    run.evaluate(chosen)
    assert len(counted) == 3
    run.evaluate(replace(chosen, steps=[1, 2]))
    assert counted[3:] == ["student, 1 step", "student, 2 steps"]


def test_another_process_draws_its_share_and_opens_nothing(run_folder, tmp_path, fakes, monkeypatch):
    monkeypatch.setattr(run, "_broadcast", lambda left_out, place: left_out)
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
    small, large = (find_models(str(model)) for model in (run_folder / "student", copy))
    usual = options(copy, tmp_path)
    assert [m.name for m in chosen_metrics((), small)] == ["scenes", "fid", "diversity", "clip", "latency"]
    assert [m.name for m in chosen_metrics((), large)] == ["fid", "diversity", "clip", "geneval", "latency"]
    assert main_prompts(usual, small).name == "scenes"
    assert isinstance(main_prompts(usual, large), NotHereError)


def test_a_reference_that_has_to_be_fetched_costs_nothing_else(run_folder, tmp_path):
    reference = tmp_path / "mjhq"
    reference.mkdir()
    (reference / "meta_data.json").write_text(json.dumps({"a": {"category": "art", "prompt": "a fox"}}))
    chosen = options(
        run_folder / "student",
        tmp_path,
        metrics=["scenes", "fid"],
        steps=[1],
        choices={"count": 2, "reference": reference},
    )
    result = run.evaluate(chosen)
    assert result.left_out.keys() == {"fid"} and "the pictures are not here" in result.left_out["fid"]
    assert list(result.columns[0].measured) == ["scenes"]


def test_a_broken_recipe_is_told_before_anything_is_drawn(run_folder, tmp_path, fakes):
    folder = shutil.copytree(run_folder, tmp_path / "broken")
    (folder / "recipe.yaml").write_bytes(b"\xff")
    fakes(Fake("clip"))
    with pytest.raises(SprintError, match="is not UTF-8 text"):
        run.evaluate(options(folder, tmp_path, metrics=["clip"], steps=[1]))
    assert not (tmp_path / "out").exists()


def test_the_record_has_what_decides_a_picture(run_folder, tmp_path, fakes):
    fakes(Fake("clip"))
    result = run.evaluate(options(run_folder / "student", tmp_path, metrics=["clip"], steps=[1]))
    (column,) = result.columns
    assert (column.size, column.dtype, column.batch) == (64, "fp32", SMALL_BATCH)
    assert result.settings["batch size"] == "50" and result.settings["picture size"] == "64 px"
    assert result.environment.keys() >= {"torch", "numpy", "scipy", "pillow", "python", "device"}


def test_the_device_told_is_the_one_in_use(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU {device.index}")
    assert environment("cuda:1")["device"].startswith("GPU 1")
    assert "GPU" not in environment("cpu")["device"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("reference", "a/b"),
        ("inception_weights", "a/b"),
        ("clip_model", "a/b/c"),
        ("clip_model", "/clip"),
        ("geneval_detector", "./masks"),
        ("geneval_metadata", "prompts.jsonl"),
        ("geneval_metadata", "a/prompts.jsonl"),
    ],
)
def test_a_path_that_is_given_and_not_there_is_wrong_input(tmp_path, option, value):
    with pytest.raises(SprintError, match=f"--{option.replace('_', '-')} {value}: no such file or folder"):
        check_paths(Choices(tmp_path, tmp_path, **{option: value}))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("clip_model", "openai/clip"),
        ("geneval_detector", "owner/name"),
        ("geneval_metadata", "owner/data:prompts/x.jsonl"),
        ("geneval_metadata", "owner/data"),
    ],
)
def test_what_may_be_on_the_hub_is_no_path(tmp_path, option, value):
    check_paths(Choices(tmp_path, tmp_path, **{option: value}))


def test_the_papers_figures_stand_beside_students_of_its_sizes():
    fid = {"fid": Measured({"FID": Figure(9.0, higher=False)}), "scenes": Measured({})}
    ours = [Column("student", 2, "a", measured=fid), Column("student", 3, "a"), Column("teacher", 20, "b")]
    (beside,) = beside_columns(ours, {"a": "0.6b", "b": None})
    assert beside.title == "published 0.6b, 2 steps"
    assert beside.measured == {"fid": Measured({"FID": Figure(6.54, higher=False, spec=".2f")})}


# ---- result.json ------------------------------------------------------------------------------------


def test_a_figure_that_is_not_finite_stays_one(tmp_path):
    column = Column("student", 1, "m", measured={"fid": Measured({"FID": Figure(math.nan, higher=False)})})
    path = write_result(tmp_path, Result("x", [column], protocols={"fid": {}}))
    assert "NaN" not in path.read_text()
    (figure,) = read_result(path).rows()[("fid", "FID")]
    assert math.isnan(figure.value) and str(figure) == "–"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "columns": 3}', '{"format": 0}'])
def test_what_is_no_result_is_refused(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(SprintError, match=r"result\.json"):
        read_result(tmp_path)


def test_every_part_of_a_result_is_looked_at(tmp_path):
    verdicts = Verdicts("s", correct=[True], reasons=["fine"])
    column = Column("student", 1, "m", measured={"scenes": Measured({"x": Figure(1.0)}, verdicts)})
    file = write_result(tmp_path, Result("x", [column], {"s": [Shot("a dot", 0)]}, {"scenes": {"a": "b"}}))
    whole = json.loads(file.read_text())
    read_result(tmp_path)

    def refused(change):
        data = json.loads(json.dumps(whole))
        change(data, data["columns"][0])
        file.write_text(json.dumps(data))
        with pytest.raises(SprintError, match=r"not a result of `sprint evaluate`"):
            read_result(tmp_path)

    measured = lambda column: column["measured"]["scenes"]  # noqa: E731
    refused(lambda data, column: data.update(columns=[]))
    refused(lambda data, column: column.update(steps="one"))
    refused(lambda data, column: column.update(model=3))
    refused(lambda data, column: measured(column)["figures"]["x"].update(value="much"))
    refused(lambda data, column: measured(column)["figures"]["x"].update(spec="{0}"))
    refused(lambda data, column: measured(column)["verdicts"].update(correct=[]))
    refused(lambda data, column: measured(column)["verdicts"].update(reasons=["a", "b"]))
    refused(lambda data, column: measured(column)["verdicts"].update(prompts="t"))
    refused(lambda data, column: data["sets"].update(s=[["a dot", "first"]]))
    refused(lambda data, column: data["settings"].update(guidance=4.5))


# ---- a run on data of one's own -----------------------------------------------------------------------


def test_a_run_draws_its_own_captions_where_it_has_any(run_folder, tmp_path):
    own = tmp_path / "mine"
    shutil.copytree(run_folder, own)
    chosen = options(own, tmp_path)
    assert usual_of_own_prompts(chosen) == () and main_prompts(chosen, find_models(str(own))).name == "scenes"
    (own / "prompts.txt").write_text("a fox\na hen in the snow\n")
    usual = usual_of_own_prompts(chosen)
    assert "pace" in usual and "scenes" not in usual
    prompts = main_prompts(chosen, find_models(str(own)))
    assert [shot.prompt for shot in prompts.shots] == ["a fox", "a hen in the snow"]
    asked = replace(chosen, prompts="scenes")
    assert usual_of_own_prompts(asked) == () and main_prompts(asked, find_models(str(own))).name == "scenes"
    assert (
        main_prompts(options(own / "student", tmp_path), find_models(str(own / "student"))).name == "scenes"
    )
