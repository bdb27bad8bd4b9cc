"""That tools/chaos/__main__.py tells when something is lost: what it judges is made here, and made wrong."""

import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sprint.base.errors import SprintError
from sprint.data.items import BadSample
from sprint.data.source import open_items
from sprint.engine import checkpoint
from sprint.recipe.schema import Data, DataKind
from sprint.train.log import METRICS
from tools.chaos import __main__ as chaos
from tools.chaos import data as chaos_data
from tools.chaos import disk as chaos_disk
from tools.chaos.kills import moments_to_kill
from tools.chaos.lab import Lab, Outcome, last_line, losses_of
from tools.chaos.runs import (
    Moment,
    Size,
    Stuck,
    Tempo,
    until,
)

WEIGHTS = ("teacher/transformer/weights", "student/transformer/weights", "student/transformer/logvar")
SIZE = Size(adapt=3, distill=4, save_every=2)


def finished_run(folder: Path, seconds: float = 1.0) -> Path:
    """What a run leaves, as far as it is compared."""
    for seed, name in enumerate(WEIGHTS):
        file = folder / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.randn(8, generator=torch.Generator().manual_seed(seed))}, file)
    steps = [("adapt", k + 1) for k in range(SIZE.adapt)] + [("distill", k + 1) for k in range(SIZE.distill)]
    write_log(folder, [row(stage, step, seconds * (i + 1)) for i, (stage, step) in enumerate(steps)])
    return folder


def row(stage: str, step: int, seconds: float) -> dict:
    return {
        "stage": stage,
        "step": step,
        "phase": "G",
        "seconds": seconds,
        "loss": 1 / step,
        "ms_data": seconds,
    }


def write_log(folder: Path, rows: list[dict]) -> None:
    (folder / METRICS).write_text("".join(json.dumps(each) + "\n" for each in rows))


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """A run and its reference, alike but for the clock."""
    return finished_run(tmp_path / "run", seconds=2.0), finished_run(tmp_path / "reference")


# ---- weights and losses -------------------------------------------------------------------------------


def test_nothing_is_lost_from_a_run_with_the_same_bits(pair):
    assert losses_of(*pair) == []


@pytest.mark.parametrize("name", WEIGHTS)
def test_one_bit_of_the_weights_is_a_loss(pair, name):
    chaos_disk.flip(pair[0] / f"{name}.safetensors", random.Random(0))
    assert losses_of(*pair) == [f"{name}.safetensors has other bits"]


def test_weights_that_are_not_there_are_a_loss(pair):
    (pair[0] / f"{WEIGHTS[1]}.safetensors").unlink()
    assert losses_of(*pair) == [f"{WEIGHTS[1]}.safetensors is missing"]


def test_a_loss_that_differs_in_its_last_digit_is_named(pair):
    rows = rows_of(pair[0])
    rows[4]["loss"] += 1e-15
    write_log(pair[0], rows)
    assert losses_of(*pair) == [f"distill step 2: loss = {rows[4]['loss']}, not 0.5"]


@pytest.mark.parametrize(
    "change",
    [lambda rows: rows[:-1], lambda rows: [*rows, rows[-1]], lambda rows: [rows[1], rows[0], *rows[2:]]],
    ids=["missing", "double", "out of order"],
)
def test_each_step_is_logged_once_and_in_order(pair, change):
    write_log(pair[0], change(rows_of(pair[0])))
    (text,) = losses_of(*pair)
    assert "not each of 7 steps once and in order" in text


def test_nothing_can_be_compared_with_a_run_that_has_no_student(pair):
    for file in (pair[1] / "student").rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(SprintError, match="no finished run to compare with"):
        losses_of(*pair)


# ---- the verdict --------------------------------------------------------------------------------------


class NoZygote:
    """In place of one; no case here starts anything."""

    cpu_seconds = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def well(lab: Lab, outcome: Outcome) -> None:
    """Nothing goes wrong."""
    outcome.did("nothing much")


def losing(lab: Lab, outcome: Outcome) -> None:
    """A weight is lost."""
    outcome.require(False, "a weight has other bits")


def stuck(lab: Lab, outcome: Outcome) -> None:
    """Waits in vain."""
    until(lambda: False, "the end of the run", seconds=0.01)


def failing(lab: Lab, outcome: Outcome) -> None:
    """Cannot even begin."""
    raise SprintError("an undisturbed run fails")


@pytest.mark.parametrize(
    ("cases", "code", "said"),
    [
        ([well], 0, "lost: nothing."),
        ([well, losing], 1, "LOST: a weight has other bits"),
        ([stuck, well], 1, "LOST: Stuck: the end of the run: not within 0 s"),
        ([failing], 1, "LOST: SprintError: an undisturbed run fails"),
    ],
)
def test_whatever_is_lost_makes_it_exit_with_1(monkeypatch, capsys, cases, code, said):
    written = []
    monkeypatch.setattr(chaos, "Zygote", NoZygote)
    monkeypatch.setattr(chaos, "CASES", {case.__name__: case for case in cases})
    monkeypatch.setattr(chaos, "write", lambda args, outcomes, folder: written.append(outcomes))
    assert chaos.main([]) == code
    assert said in capsys.readouterr().out
    assert [outcome.name for outcome in written[0]] == [case.__name__ for case in cases]


def test_every_case_says_what_it_does_and_the_table_what_was_lost(capsys):
    assert all(case.__doc__ for case in chaos.CASES.values())
    text = chaos.table([Outcome("kills", tried=["a", "b"]), Outcome("stop", lost=["this", "that"])])
    assert [line.split()[0] for line in text.splitlines()] == ["case", "kills", "stop"]
    assert text.splitlines()[1].endswith("nothing") and text.splitlines()[2].endswith("this; that")
    with pytest.raises(SystemExit) as exit:
        chaos.main(["--help"])
    assert exit.value.code == 0 and "--only" in capsys.readouterr().out


# ---- moments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_kills_are_spread_over_the_whole_life_and_repeatable(processes):
    draw = [moments_to_kill(random.Random(seed), 20, Size(), processes) for seed in ("a", "a", "b")]
    assert draw[0] == draw[1] != draw[2]
    moments, rows = draw[0], [moment.row for moment in draw[0]]
    assert len(moments) == 20
    assert {0, Size().adapt, Size().rows} <= set(rows) and max(rows) == Size().rows
    assert sum(moment.saving for moment in moments) == 5
    alone = [moment for moment in moments if moment.rank is not None]
    assert bool(alone) == (processes > 1)
    assert all(0 < moment.row < Size().rows for moment in alone)


def test_a_few_kills_are_moments_too():
    assert [len(moments_to_kill(random.Random(0), count, SIZE, 2)) for count in (1, 2, 3, 6, 7)] == [
        1,
        2,
        3,
        6,
        7,
    ]
    assert (
        str(Moment(3, 0.25)) == "25% of step 3 to 4" and str(Moment(3, 0.5, True)) == "50% of the next save"
    )


def test_the_tempo_is_what_was_seen(monkeypatch):
    class Scripted:
        """Starts at 0, logs at 5 and 6, saves from 6 to 8, ends at 9."""

        class command:
            size = Size(1, 1, 1)

        began, now = 0.0, -1.0
        ended = property(lambda self: self.now >= 9)

        def rows(self):
            return (self.now >= 5) + (self.now >= 6)

        def writing(self):
            return 6 < self.now <= 8

    life = Scripted()

    def tick(seconds=0.0):
        life.now += 1.0

    monkeypatch.setattr("tools.chaos.runs.time.monotonic", lambda: life.now)
    monkeypatch.setattr("tools.chaos.runs.time.sleep", tick)
    assert Tempo.of(life) == Tempo(gaps=[5.0, 1.0, 3.0], save=1.0)


# ---- damage and recovery ------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", chaos_disk.DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("seed", range(4))
def test_every_damage_is_one(tmp_path, damage, seed):
    saver = checkpoint.Saver(tmp_path)
    saver.save("distill-2", {"w": torch.arange(64.0)}, {"step": 2, "stage": {}})
    saver.wait()
    newest = checkpoint.latest(tmp_path)
    damage(newest, random.Random(seed))
    assert checkpoint.latest(tmp_path) is None


SAID = """\
warning: checkpoint runs/chaos/checkpoints/distill/000002-distill-6 is damaged; falling back to the one before it
2/2 distill  25% |######                  | 3/12 [00:00, ? left]\r2/2 distill 100% |####| 12/12 [00:05, 00:00 left]
"""


def test_recovery_is_judged_by_what_the_run_says():
    outcome = Outcome("damaged")
    chaos_disk.judge_recovery(outcome, SAID, "truncated", step=3, damaged=1)
    assert outcome.lost == []
    chaos_disk.judge_recovery(outcome, SAID, "truncated", step=6, damaged=1)
    chaos_disk.judge_recovery(outcome, SAID, "all", step=3, damaged=2)
    assert outcome.lost == ["did not go on from step 6", "named 1 damaged checkpoints, not 2"]
    assert not chaos_disk.resumed_at("", "distill", 0) and not chaos_disk.resumed_at(SAID, "adapt", 3)
    assert last_line(SAID).startswith("2/2 distill 100%") and last_line("\n") == "it said nothing"


# ---- poison -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["webdataset", "folder"])
def test_what_is_planted_is_what_the_readers_find(tmp_path, kind):
    plant = {"webdataset": chaos_data.plant_shard, "folder": chaos_data.plant_folder}[kind]
    folder = tmp_path / "data"
    folder.mkdir()
    planted, good = plant(folder)
    items = open_items(Data(kind=DataKind(kind), path=str(folder), size=64, bad_share=0.5))
    found, whole = Counter(), 0
    for index in range(len(items)):
        try:
            items.item(index, np.random.default_rng(0))
            whole += 1
        except BadSample as bad:
            found[bad.reason] += 1
    assert found == planted and whole == good
    assert list(tmp_path.iterdir()) == [folder]


def test_the_folders_of_runs_are_theirs():
    own = ["runs", "001", "001/runs/chaos/x.png", "003.007", "003.007.end"]
    others = ["absolute.png", "001/climbed.png", "poisoned-folder/a.png"]
    assert all(chaos_data.runs_own(Path(name)) for name in own)
    assert not any(chaos_data.runs_own(Path(name)) for name in others)


def test_until_gives_the_seconds_or_says_what_did_not_happen():
    assert until(lambda: True, "now") < 1
    with pytest.raises(Stuck, match=r"a save: not within 0 s"):
        until(lambda: False, "a save", seconds=0.01)


def test_the_record_holds_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.bench.measure.RESULTS", tmp_path)
    outcome = Outcome("poison")
    outcome.tried.append(f"sprint: {tmp_path}{os.sep}runs{os.sep}0.png: unseen")
    record = chaos.write(chaos.parser().parse_args([]), [outcome], tmp_path)
    assert json.loads(record.read_text())["cases"][0]["tried"] == [f"sprint: runs{os.sep}0.png: unseen"]
