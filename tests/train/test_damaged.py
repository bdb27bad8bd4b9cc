"""A run's own files, damaged at any byte: the run goes on, or says in one line which file is in the way."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sprint.base.errors import SprintError
from sprint.engine import checkpoint
from sprint.evaluate.models import own_evaluation, recipe_of
from sprint.evaluate.page import page_html
from sprint.evaluate.result import Column, Figure, Measured, Result, Shot, Verdicts, read_result, write_result
from sprint.evaluate.store import Drawing, PictureStore, Times
from sprint.recipe.load import load_recipe, recipe_text
from sprint.train.costs import note_cost, read_costs
from sprint.train.folder import claim
from sprint.train.log import METRICS, RunLog, read_metrics, truncate_metrics
from sprint.train.report.curves import training_curves, update_times
from sprint.train.report.report import Report, report_html

HASH = "0123456789ab"
DRAWING = Drawing("0" * 64, (1.5708, 0.0), 4.5, 64)
HUGE = b"9" * 400
WHOLE = [  # in a file's place
    *(b"", b"\0" * 40, b"\xff\xfe" * 20, b"null", b"[]", b"{}", b"7\n", b'"text"\n'),
    *(b"[" * 100_000, b'{"a":' * 100_000, HUGE, b'{"seconds": {"adapt": ' + HUGE + b'}, "peak_memory": 1}'),
    b'{"format": 1, "columns": [], "sets": {}, "protocols": {}}',
]
PARTS = [b"", b"\0", b"\xff", b"null", b"-1", b"[]", b"{}", b'"', b"1e999", HUGE, b"true", b"\n", b"}"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run's folder with every file that is read again, but no networks."""
    folder = tmp_path_factory.mktemp("run")
    recipe = load_recipe("tiny")
    for part in ("student", "teacher"):
        (folder / part).mkdir()
    (folder / "recipe.yaml").write_text(recipe_text(recipe))
    claim(folder, HASH)
    for part in ("adapt", "distill"):
        note_cost(folder, part, 3.0)
    with RunLog(folder, {"adapt": 8, "distill": 8}) as log:
        for stage, phases in (("adapt", ["flow"]), ("distill", ["G", "D"])):
            log.begin(stage, 0)
            for step in range(1, 9):
                log.write(
                    step, phases[step % len(phases)], {"loss": 0.1 * step, "grad_norm": 1.0}, {"data": 2.0}
                )
    shots = [Shot("a red dot", 3, "single_object"), Shot("two dots", 4)]
    verdicts = Verdicts("scenes", correct=[True, False], reasons=["seen", "one dot"])
    measured = {"scenes": Measured({"scene score": Figure(0.5, 0.1)}, verdicts)}
    columns = [Column("student", 1, "student", "0" * 64, (1.5, 0.0), "pictures/1", measured)]
    protocols = {"scenes": {"pictures": "2"}}
    result = Result("run", columns, {"scenes": shots}, protocols, used={"scenes": "scenes"})
    write_result(folder / "evaluation", result)
    PictureStore(folder / "evaluation", DRAWING).describe("student", Times(2, 2, 0.1))
    saver = checkpoint.Saver(folder / "checkpoints")
    for step in (1, 2):
        saver.save(f"adapt-{step}", {"weight": torch.arange(6.0) + step}, {"step": step, "seconds": 1.0})
        saver.wait()
    return folder


def read_all(folder: Path) -> None:
    """What the page, a resumed run and an evaluation read of it."""
    costs, rows = read_costs(folder), read_metrics(folder / METRICS)
    report = Report(
        "run", curves=training_curves(rows), update_times=update_times(rows), seconds=costs.seconds
    )
    report_html(folder, report)
    note_cost(folder, "evaluate", 1.0)
    truncate_metrics(folder / METRICS, "adapt", 4)
    PictureStore(folder / "evaluation", DRAWING).describe("student", Times(2, 2, 0.1))
    if newest := checkpoint.latest(folder / "checkpoints"):
        facts, weight = checkpoint.read_facts(newest), torch.empty(6)
        checkpoint.read_tensors(newest, {"weight": weight})
        assert torch.equal(weight, torch.arange(6.0) + facts["step"])


def read_result_and_page(folder: Path) -> None:
    page_html(folder / "evaluation", read_result(folder / "evaluation"))


def read_recipe(folder: Path) -> None:
    recipe_of(str(folder))
    own_evaluation(str(folder))
    load_recipe(folder / "recipe.yaml")


def read_owner(folder: Path) -> None:
    claim(folder, HASH)


READERS: dict[str, Callable[[Path], None]] = {
    "costs.json": read_all,
    METRICS: read_all,
    "evaluation/01-*/drawing.json": read_all,
    "checkpoints/000002-*/facts.json": read_all,
    "checkpoints/000002-*/manifest.json": read_all,
    "checkpoints/000002-*/.metadata": read_all,
    "evaluation/result.json": read_result_and_page,
    "recipe.yaml": read_recipe,
    "recipe.hash": read_owner,
}
GO_ON = {name for name, reader in READERS.items() if reader is read_all}  # whatever their content


def survives(folder: Path, name: str, file: Path) -> bool:
    """Whether all is read; if not, that one line names the file, or a recipe's values."""
    try:
        READERS[name](folder)
        return True
    except SprintError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        assert str(file.parent) in str(error) or name == "recipe.yaml" or "another recipe" in str(error), (
            error
        )
        return False


@pytest.fixture
def copy(whole, tmp_path) -> Callable[[], Path]:
    """-> a fresh one, at the same place"""

    def fresh() -> Path:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return Path(shutil.copytree(whole, tmp_path / "run"))

    return fresh


@pytest.mark.parametrize("name", READERS)
def test_untouched(copy, name, caplog):
    folder = copy()
    (file,) = folder.glob(name)
    assert survives(folder, name, file)
    assert not [record for record in caplog.records if record.name.startswith("sprint")]


@pytest.mark.parametrize("name", READERS)
def test_damaged(copy, name):
    """Something else in its place, a part of it, or bytes of it changed: nothing but SprintErrors, one line each."""
    draw = random.Random(name)
    folder = copy()
    (file,) = folder.glob(name)
    content = file.read_bytes()
    damaged = [*WHOLE, *(content[: draw.randrange(len(content))] for _ in range(8))]
    for part in PARTS * 2:
        start = draw.randrange(len(content))
        damaged.append(content[:start] + part + content[start + draw.choice([0, 1, 8]) :])
    outcomes = set()
    for one in damaged:
        file.write_bytes(one)
        outcomes.add(survives(folder, name, file))
        if name.startswith("checkpoints"):
            folder = copy()
    assert False in outcomes or name in GO_ON
    if name in GO_ON:
        assert outcomes == {True}


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to itself"])
@pytest.mark.parametrize("name", READERS)
def test_something_else_in_its_place(copy, name, kind):
    folder = copy()
    (file,) = folder.glob(name)
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(file.name)
    try:
        survives(folder, name, file)
    except OSError as error:  # of writing where a folder is: the command line names the file
        assert kind == "folder" and error.filename
