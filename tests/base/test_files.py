"""Files and folders that are whole or not there."""

import os
import socket
import subprocess

import pytest

from sprint.base.files import put_in_place, remove_whole, scrap_of, sweep, whole_or_absent


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_is_built_takes_its_place_at_the_end(tmp_path):
    target = tmp_path / "a" / "b" / "out"
    with whole_or_absent(target, target.with_name(".out.part")) as place:
        place.mkdir()
        (place / "file").write_text("x")
        assert not target.exists()
    assert tree(target.parent) == ["out", "out/file"]


def test_a_file_is_built_as_a_folder_is(tmp_path):
    with whole_or_absent(tmp_path / "out.bin", tmp_path / ".part") as place:
        place.write_text("x")
    assert tree(tmp_path) == ["out.bin"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, ValueError])
def test_after_an_error_nothing_is_left_not_even_parents(tmp_path, error):
    target = tmp_path / "a" / "b" / "out"
    with pytest.raises(error), whole_or_absent(target, target.with_name(".out.part")) as place:
        place.mkdir()
        (place / "file").write_text("x")
        raise error
    assert tree(tmp_path) == []


def test_after_an_error_what_was_there_is_as_it_was(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(ValueError), whole_or_absent(tmp_path / "out", tmp_path / ".part") as place:
        place.mkdir()
        raise ValueError
    assert tree(tmp_path) == ["out", "out/old"]
    with whole_or_absent(tmp_path / "out", tmp_path / ".part") as place:
        place.mkdir()
        (place / "new").write_text("new")
    assert tree(tmp_path) == ["out", "out/new"]


def test_scraps_of_a_killed_process_go_first(tmp_path):
    (tmp_path / ".part" / "out").mkdir(parents=True)
    (tmp_path / ".part" / "out" / "torn").write_text("x")
    with whole_or_absent(tmp_path / "out", tmp_path / ".part") as place:
        place.mkdir()
    assert tree(tmp_path) == ["out"]


def test_a_move_that_fails_brings_back_what_was_there(tmp_path, monkeypatch):
    for name in ("fresh", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    move = os.replace

    def fail(source, target):
        if source == tmp_path / "fresh":
            raise OSError(28, "No space left on device")
        move(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        put_in_place(tmp_path / "fresh", tmp_path / "out")
    assert tree(tmp_path) == ["fresh", "fresh/fresh", "out", "out/out"]


def test_what_is_removed_was_renamed_before(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    seen = []
    monkeypatch.setattr("shutil.rmtree", lambda folder, **how: seen.append((folder, tree(tmp_path))))
    remove_whole(tmp_path / "old", ".going")
    assert seen == [(tmp_path / ".going", [".going"])]


def test_what_a_dead_process_left_is_swept(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    host = socket.gethostname()
    left = [
        tmp_path / f".data.fingerprint.{host}.{gone.pid}.part",
        tmp_path / f".x.npz.{host}.{gone.pid}.part",
    ]
    others = [
        scrap_of(tmp_path / "mine"),
        tmp_path / f".x.elsewhere.{gone.pid}.part",
        tmp_path / "x.part",
        tmp_path / ".out.part",
    ]
    for file in (*left, *others):
        file.touch()
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)
