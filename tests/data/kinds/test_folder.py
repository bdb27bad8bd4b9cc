"""The folder of pictures: which files are found, captions in .txt and .json, every wrong folder."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from sprint.base.errors import SprintError
from sprint.data.items import BadSample
from sprint.data.kinds.folder import FolderItems
from sprint.data.source import open_source
from sprint.recipe.schema import Data, DataKind
from tests.data.picture_files import write_folder, write_pair


def items_of(path, size=8, **settings):
    return FolderItems(folder_data(path, size, **settings))


def folder_data(path, size=8, **settings):
    return Data(kind=DataKind.folder, path=str(path), size=size, **settings)


def all_of(items):
    return [items.item(k, np.random.default_rng(k)) for k in range(len(items))]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path)


def test_items_are_sorted_by_path(folder):
    samples = all_of(items_of(folder))
    assert [s.caption for s in samples] == ["caption deep/er/p6", *(f"caption p{k}" for k in range(6))]
    assert [s.picture[0, 0, 0] for s in samples] == [6, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".webp"])
def test_every_kind_of_picture_is_found_and_read(tmp_path, suffix):
    Image.new("RGB", (20, 10), (200, 100, 50)).save(tmp_path / f"a.b{suffix}", quality=95)
    (tmp_path / "a.b.txt").write_text("\ufeff  two words \n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not a caption")
    (tmp_path / "about.json").write_text("{}")
    (tmp_path / "._a.png").write_text("hidden")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.png").write_text("hidden")
    items = items_of(tmp_path)
    (sample,) = all_of(items)
    assert sample.caption == "two words" and items.size(0) == (10, 20)
    assert abs(sample.picture.astype(int) - (200, 100, 50)).max() <= 3


def test_captions_in_json(folder):
    (folder / "p1.txt").unlink()
    (folder / "p1.json").write_text(json.dumps({"captions": ["a", "b"], "clip_scores": [9, -9]}))
    (folder / "p2.txt").unlink()
    (folder / "p2.JSON").write_text('{"prompt": "of p2", "height": 8}')
    (folder / "p3.json").write_text('{"prompt": "beside p3.txt"}')
    assert [s.caption for s in all_of(items_of(folder))][2:5] == ["a", "of p2", "caption p3"]


def test_of_several_captions_the_position_draws_one(tmp_path):
    write_pair(tmp_path, "a")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.json").write_text('{"captions": ["a", "b"]}')
    source = open_source(folder_data(tmp_path))
    captions = [s.caption for s in source.samples(range(40))]
    assert 8 < captions.count("a") < 32
    assert [s.caption for s in source.samples(range(20, 40))] == captions[20:]


# Bad samples


def bad_of(folder, **settings):
    """{name: reason} of those that cannot be read."""
    items, bad = items_of(folder, **settings), {}
    for k in range(len(items)):
        try:
            items.item(k, np.random.default_rng(0))
        except BadSample as sample:
            bad[os.path.relpath(sample.where, folder)] = sample.reason
    return bad


def test_every_bad_sample_is_named_with_its_reason(folder):
    (folder / "p0.txt").unlink()
    (folder / "p1.png").unlink()
    (folder / "p2.txt").write_bytes(b" \n\t")
    (folder / "p3.txt").write_bytes(b"caf\xe9")
    (folder / "p4.png").write_bytes(b"<html>")
    (folder / "p5.txt").unlink()
    (folder / "p5.json").write_text("{")
    assert bad_of(folder, bad_share=0.9) == {
        "p0.png": "missing caption",
        "p1.txt": "missing picture",
        "p2.txt": "empty caption",
        "p3.txt": "unreadable caption",
        "p4.png": "unreadable picture",
        "p5.json": "unreadable caption",
    }
    items = items_of(folder, bad_share=0.9)
    for index in (1, 2):
        with pytest.raises(BadSample):
            items.size(index)
    source = open_source(folder_data(folder, bad_share=1.0))
    assert {s.caption for s in source.samples(range(7))} == {"caption deep/er/p6"}
    assert source.skipped["unreadable caption"] == 2 and sum(source.skipped.values()) == 6


def test_captions_that_nest_too_deep(tmp_path):
    write_pair(tmp_path, "a").with_suffix(".txt").unlink()
    (tmp_path / "a.json").write_text("[" * 100000)
    with pytest.raises(BadSample, match=r"a.json: unreadable caption: it is not valid JSON"):
        all_of(items_of(tmp_path))


def test_the_fingerprint_is_that_of_the_names(tmp_path):
    write_folder(tmp_path / "a")
    first = items_of(tmp_path / "a").fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "p0.txt").write_text("another caption")
    assert items_of(f"{tmp_path}/b/./").fingerprint == first and len(first) == 64
    (tmp_path / "b" / "p0.png").rename(tmp_path / "b" / "p0.webp")
    second = items_of(tmp_path / "b").fingerprint
    write_pair(tmp_path / "b", os.fsdecode(b"p\xff"), caption="of a name that is not UTF-8")
    assert len({first, second, items_of(tmp_path / "b").fingerprint}) == 3


# Wrong folders


def refusal(path, **settings):
    with pytest.raises(SprintError) as caught:
        items_of(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_folder(tmp_path):
    assert refusal(tmp_path / "no").startswith(f"{tmp_path / 'no'}: no such folder; set data.path")


def test_a_file_is_no_folder(tmp_path):
    file = write_pair(tmp_path, "a")
    assert refusal(file).startswith(f"{file}: not a folder; set data.path")


def test_folder_without_pictures(tmp_path):
    (tmp_path / "a.txt").write_text("alone")
    assert refusal(tmp_path).startswith(f"{tmp_path}: no pictures there; expected NAME.jpg")


def test_many_pictures_without_captions_are_counted_and_the_first_is_named(folder):
    (folder / "p4.txt").unlink()
    (folder / "deep/er/p6.txt").unlink()
    assert refusal(folder, bad_share=0.28).startswith(
        f"{folder}/deep/er/p6.png: picture without caption (2 of 7, more than data.bad_share = 0.28 allows)"
    )
    assert len(items_of(folder, bad_share=0.29)) == 7


def test_many_captions_without_pictures_are_counted_and_the_first_is_named(folder):
    (folder / "p2.png").unlink()
    (folder / "p5.png").unlink()
    assert refusal(folder).startswith(f"{folder}/p2.txt: caption without picture (2 of 7, more than")
    assert len(items_of(folder, bad_share=0.29)) == 7


def test_two_pictures_of_one_name(folder):
    Image.new("RGB", (4, 4)).save(folder / "p1.jpg")
    assert refusal(folder) == f"{folder}/p1.png: {folder}/p1.jpg has the same name; keep one of them"


def test_unreadable_subfolder(folder, monkeypatch):
    scandir = os.scandir

    def refuse_deep(path):
        if os.path.basename(path) == "deep":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_deep)
    assert refusal(folder) == f"{folder}/deep: cannot be read: Permission denied"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables_of_every_delimiter(tmp_path, delimiter, mark):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [["Text", "width", "file_name"], [f'"one{delimiter} two"', "8", "a.png"]]
    table = "\r\n".join(map(delimiter.join, rows))
    (tmp_path / "metadata.csv").write_text(mark + table, encoding="utf-8")
    (sample,) = all_of(items_of(tmp_path))
    assert sample.caption == f"one{delimiter} two"


def test_a_row_with_too_many_columns_is_not_cut(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one, two\n")
    assert "line 2: 3 columns, the header has 2; put a text that holds ','" in refusal(tmp_path)


def test_the_table_of_kohyas_scripts(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "meta_cap.json").write_text(
        json.dumps({str(tmp_path / "a.png"): {"caption": "one", "tags": "t"}})
    )
    (sample,) = all_of(items_of(tmp_path))
    assert sample.caption == "one"


def test_what_other_programs_leave_is_passed_over(folder):
    number = len(items_of(folder))
    for name in ("@eaDir", "__MACOSX", "deep/#recycle"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / name / "p1.png")
    assert len(items_of(folder)) == number


def test_a_caption_named_after_the_whole_file_is_said(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.png.txt").write_text("one")
    assert "a.png.txt is there; name it a.txt" in refusal(tmp_path)
