"""A second evaluation in the same folder: what of the first one stays, and whose folder it is."""

import dataclasses

import pytest

from sprint.base.errors import SprintError
from sprint.evaluate import run
from sprint.evaluate.earlier import open_out, with_earlier
from sprint.evaluate.models import Model
from sprint.evaluate.result import Column, Figure, Measured, Result, Shot, read_result, write_result
from tests.evaluate.fixtures import Fake, options

pytest_plugins = "tests.evaluate.fixtures"
SHOTS = [Shot("a dot", 0)]
SETTINGS = {"seeds": "from 0 on", "guidance": "4.5"}


def result(metric="clip", shots=SHOTS, **changes) -> Result:
    """One metric of one student, at one step."""
    measured = {metric: Measured({metric: Figure(1.0)})}
    column = Column("student", 1, "m", "f" * 64, (1.5, 0.0), "pictures/a", measured, size=64, dtype="fp32")
    seen = metric != "latency"
    found = Result(
        "x",
        [dataclasses.replace(column, **changes)],
        {"prompts": shots} if seen else {},
        {metric: {"pictures": "1"}},
        settings=SETTINGS,
        command=f"sprint {metric}",
        used={metric: "prompts"} if seen else {},
    )
    return found


def test_other_metrics_of_the_same_columns_stay(tmp_path):
    write_result(tmp_path, result())
    new = dataclasses.replace(result("latency"), left_out={"clip": "fetch it"})
    joined, dropped = with_earlier(new, read_result(tmp_path))
    assert dropped == [] and joined.columns[0].measured.keys() == {"clip", "latency"}
    assert joined.protocols.keys() == {"clip", "latency"} and joined.used == {"clip": "prompts"}
    assert joined.sets == {"prompts": SHOTS} and joined.left_out == {}
    assert joined.command == "sprint clip\nsprint latency"


def test_what_is_measured_again_takes_the_place_of_the_earlier_figure():
    new = dataclasses.replace(result(), protocols={"clip": {"pictures": "2"}})
    assert with_earlier(new, result()) == (new, [])


@pytest.mark.parametrize(
    "changes",
    [{"hash": "e" * 64}, {"times": (1.4, 0.0)}, {"size": 128}, {"dtype": "bf16"}],
)
def test_columns_that_are_others_now_are_dropped_and_told(changes):
    new = result("latency", **changes)
    joined, dropped = with_earlier(new, result())
    assert joined == new
    assert dropped == ["student, 1 step: weights, times, size or dtype are others now"]


def test_columns_that_are_not_asked_for_are_told():
    assert with_earlier(result("latency", steps=2), result())[1] == ["student, 1 step: not asked for"]


def test_other_prompts_seeds_or_guidance_drop_a_metric():
    new = result("fid", shots=[Shot("a dot", 1)])
    assert with_earlier(new, result()) == (new, ["clip: prompts are others now"])
    new = dataclasses.replace(result("latency"), settings=SETTINGS | {"guidance": "5"})
    assert with_earlier(new, result()) == (new, ["clip: guidance: 4.5, now 5"])


def test_a_model_that_was_only_timed_stays_with_the_times():
    flux = Column("FLUX-schnell", 4, "flux", measured={"latency": Measured({"latency": Figure(2.0)})})
    earlier = result("latency")
    earlier = dataclasses.replace(earlier, columns=[*earlier.columns, flux])
    joined, dropped = with_earlier(result(), earlier)
    assert joined.columns[1] == flux and dropped == []


def test_two_commands_in_one_folder(run_folder, tmp_path, fakes, caplog):
    student = run_folder / "student"
    fakes(Fake("clip"))
    run.evaluate(options(student, tmp_path, metrics=["clip"], steps=[1]))
    fakes(Fake("fid"))
    both = run.evaluate(options(student, tmp_path, metrics=["fid"], steps=[1]))
    assert both.columns[0].measured.keys() == {"clip", "fid"} and list(both.protocols) == ["fid", "clip"]
    fakes(Fake("fid", shots=[("another", 0)]))
    alone = run.evaluate(options(student, tmp_path, metrics=["fid"], steps=[1]))
    assert alone.columns[0].measured.keys() == {"fid"}
    assert [line for line in caplog.messages if "dropped: clip: prompts are others now" in line]


# ---- whose folder it is -----------------------------------------------------------------------------


def test_an_evaluation_of_another_model_is_not_overwritten(run_folder, tmp_path, fakes):
    fakes(Fake("clip"))
    run.evaluate(options(run_folder / "student", tmp_path, metrics=["clip"], steps=[1]))
    before = (tmp_path / "out" / "result.json").read_bytes()
    with pytest.raises(
        SprintError, match=r"holds an evaluation of .*student, and this is .*teacher; give another --out"
    ):
        run.evaluate(options(run_folder / "teacher", tmp_path, metrics=["clip"], steps=[1]))
    assert (tmp_path / "out" / "result.json").read_bytes() == before


def test_the_same_weights_elsewhere_or_other_weights_in_their_place_are_the_same_model(run_folder, tmp_path):
    path = str(run_folder / "student")
    write_result(tmp_path, result(model=path))
    assert open_out(tmp_path, "pictures", Model(path, "student", (1,), 64))
    digest = run.model_hash(path)
    write_result(tmp_path, result(model="elsewhere", hash=digest))
    assert open_out(tmp_path, "pictures", Model(path, "student", (1,), 64))


def test_only_a_folder_without_an_evaluation_has_strangers(tmp_path):
    model = Model("m", "student", (1,), 64)
    (tmp_path / "compare.html").write_text("")
    with pytest.raises(SprintError, match=r"holds compare\.html and no evaluation"):
        open_out(tmp_path, "pictures", model)
    (tmp_path / "pictures").mkdir()
    assert open_out(tmp_path, "pictures", model) is None
    write_result(tmp_path, result())
    assert open_out(tmp_path, "pictures", model).name == "x"


def test_a_result_that_cannot_be_read_is_written_anew(tmp_path, caplog):
    (tmp_path / "result.json").write_text("{}")
    assert open_out(tmp_path, "pictures", Model("m", "student", (1,), 64)) is None
    assert "it is written anew" in caplog.text
