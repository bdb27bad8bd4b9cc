"""Pictures that are drawn once, by whichever process, and found again."""

import dataclasses
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sprint.base.errors import SprintError
from sprint.evaluate import store as store_file
from sprint.evaluate.result import Shot
from sprint.evaluate.store import Drawing, PictureStore, Times, draw, in_batches, wait_for

DRAWING = Drawing("a" * 64, (1.5707963, 1.3, 0.0), 4.5, 8)
SHOTS = [Shot(f"prompt {i}", 100 + i) for i in range(10)]


class Painter:
    """Stands for a generator: the colour tells prompt and seed."""

    family = SimpleNamespace(device=SimpleNamespace(type="cuda"))

    def __init__(self, die_after: int | None = None):
        self.calls, self.die_after = [], die_after

    def pictures(self, prompts, seeds, steps=None, guidance_scale=4.5, size=8, times=None):
        if len(self.calls) == self.die_after:
            raise KeyboardInterrupt
        self.calls.append(list(zip(prompts, seeds, strict=True)))
        self.asked = steps, guidance_scale, size, times
        return np.stack([colour_of(p, s, size) for p, s in self.calls[-1]])

    @property
    def drawn(self):
        return [one for call in self.calls for one in call]


def colour_of(prompt: str, seed: int, size: int = 8) -> np.ndarray:
    return np.full((size, size, 3), (seed, int(prompt.split()[-1]), 7), np.uint8)


@pytest.fixture
def store(tmp_path):
    return PictureStore(tmp_path / "pictures", DRAWING)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "b" * 64),
        ("times", (1.5707963, 1.0, 0.0)),
        ("guidance", 5.0),
        ("size", 16),
        ("dtype", "bf16"),
        ("sampling", store_file.SAMPLING + 1),
    ],
)
def test_every_part_of_a_drawing_has_its_own_folder(tmp_path, field, value):
    other = dataclasses.replace(DRAWING, **{field: value})
    assert PictureStore(tmp_path, other).folder != PictureStore(tmp_path, DRAWING).folder
    assert PictureStore(tmp_path, dataclasses.replace(DRAWING)).folder.name.startswith("02-")


def test_a_shot_is_found_by_prompt_and_seed_and_not_by_its_group():
    assert Shot("a", 1, "counting").file == Shot("a", 1).file
    assert len({Shot("a", 1).file, Shot("b", 1).file, Shot("a", 2).file}) == 3


def test_what_is_drawn_is_read_back_in_order(store):
    painter = Painter()
    assert draw(painter, store, SHOTS, 4, "drawing").pictures == 10
    assert [len(call) for call in painter.calls] == [4, 4, 2]
    assert painter.asked == (None, 4.5, 8, [1.5707963, 1.3, 0.0])
    batches = list(store.batches(SHOTS[::-1], 3, "reading"))
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert np.array_equal(np.concatenate(batches), [colour_of(s.prompt, s.seed) for s in SHOTS[::-1]])


def test_only_what_is_missing_is_drawn_again(store):
    draw(Painter(), store, SHOTS, 4, "drawing")
    for shot in SHOTS[1::2]:
        store.path(shot).unlink()
    again = Painter()
    assert draw(again, store, SHOTS, 4, "drawing").pictures == 5
    assert again.drawn == [(s.prompt, s.seed) for s in SHOTS[1::2]]
    assert draw(again, store, SHOTS, 4, "drawing").pictures == 0 and len(again.drawn) == 5


def test_an_interrupt_keeps_what_was_drawn_and_leaves_no_scrap(store):
    with pytest.raises(KeyboardInterrupt):
        draw(Painter(die_after=2), store, SHOTS, 3, "drawing")
    assert store.missing(SHOTS) == SHOTS[6:]
    assert sorted(file.name for file in store.folder.iterdir()) == sorted(s.file for s in SHOTS[:6])


def test_processes_share_the_work_and_draw_the_same_batches(store):
    painters = [Painter() for _ in range(3)]
    counts = [draw(p, store, SHOTS, 2, "drawing", rank, 3).pictures for rank, p in enumerate(painters)]
    assert counts == [4, 4, 2]
    alone = Painter()
    draw(alone, PictureStore(store.folder, DRAWING), SHOTS, 2, "drawing")
    assert sorted(call for p in painters for call in p.calls) == sorted(alone.calls)
    assert [len(p.calls) for p in painters] == [2, 2, 1] and store.missing(SHOTS) == []


def test_waiting_for_other_processes(store, monkeypatch):
    monkeypatch.setattr(store_file, "POLL_SECONDS", 0.01)
    draw(Painter(), store, SHOTS[:9], 4, "drawing")
    late = threading.Timer(0.1, store.write, (SHOTS[9], colour_of("last 9", 9)))
    late.start()
    began = time.monotonic()
    wait_for(store, SHOTS)
    assert store.path(SHOTS[9]).is_file() and time.monotonic() - began >= 0.09


def test_it_is_said_what_is_awaited(store, monkeypatch, caplog):
    monkeypatch.setattr(store_file, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(store_file, "SILENT_SECONDS", 0.05)
    late = threading.Timer(0.2, store.write, (SHOTS[0], colour_of("late 0", 0)))
    late.start()
    wait_for(store, SHOTS[:1])
    assert caplog.messages == [f"waiting for 1 pictures of other processes in {store.folder}"]


@pytest.mark.parametrize(
    "damage", [lambda png: png[:-20], lambda png: b"", lambda png: png[:50] + b"?" + png[51:]]
)
def test_a_damaged_picture_is_drawn_again(store, caplog, damage):
    draw(Painter(), store, SHOTS[:3], 4, "drawing")
    path = store.path(SHOTS[1])
    path.write_bytes(damage(path.read_bytes()))
    again = Painter()
    assert draw(again, store, SHOTS[:3], 4, "drawing").pictures == 1
    assert again.drawn == [(SHOTS[1].prompt, SHOTS[1].seed)]
    assert np.array_equal(store.read(SHOTS[1]), colour_of(*SHOTS[1][:2]))
    assert caplog.messages == [f"{path}: damaged picture; it is drawn again"]


def test_a_folder_says_what_drew_it(store):
    store.describe("runs/tiny")
    about = json.loads((store.folder / "drawing.json").read_text())
    assert (about["name"], about["size"], about["sampling"]) == ("runs/tiny", 8, store_file.SAMPLING)
    assert "torch" in about["versions"]


def test_what_drawing_took_adds_up_for_one_size_of_batch(store):
    assert store.times() is None
    store.describe("runs/tiny", Times(4, 8, 2.0))
    store.describe("runs/tiny", Times(4, 2, 1.0))
    store.describe("runs/tiny", Times(4, 0, 0.0))  # nothing was missing
    assert store.times() == Times(4, 10, 3.0)
    store.describe("runs/tiny", Times(2, 1, 0.5))
    assert store.times() == Times(2, 1, 0.5)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"times_of_drawing": {"batch": 1}}', '{"times_of_drawing": 3}']
)
def test_times_that_cannot_be_read_are_not_known(store, text):
    store.describe("runs/tiny")
    (store.folder / "drawing.json").write_text(text)
    assert store.times() is None


def test_the_time_of_writing_is_none_of_drawing(store, monkeypatch):
    """Pictures in no time, files in 50 ms each."""
    write = store.write
    monkeypatch.setattr(store, "write", lambda *pair: (time.sleep(0.05), write(*pair)))
    took = draw(Painter(), store, SHOTS, 5, "drawing")
    assert took[:2] == (5, 10) and took.seconds < 0.1


def test_pictures_that_nobody_keeps_come_in_order():
    painter = Painter()
    seeds = [shot.seed for shot in SHOTS]
    drawn = list(in_batches(painter, [s.prompt for s in SHOTS], seeds, 4, [1.5, 0.0], 4.5))
    assert [len(batch) for batch in drawn] == [4, 4, 2]
    assert painter.drawn == [(shot.prompt, shot.seed) for shot in SHOTS]


def test_a_damaged_picture_is_named(store):
    draw(Painter(), store, SHOTS[:1], 4, "drawing")
    path = store.path(SHOTS[0])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(SprintError, match=f"{path}: damaged picture; delete it"):
        store.read(SHOTS[0])


def test_grey_pictures_are_read_as_colour(store):
    store.folder.mkdir(parents=True)
    Image.new("L", (8, 8), 9).save(store.path(SHOTS[0]))
    assert store.read(SHOTS[0]).shape == (8, 8, 3)
