"""Where captions are: the same files beside a picture in a folder, in a tar and in a table give the same caption."""

import json
import os

import numpy as np
import pytest

from sprint.base.errors import SprintError
from sprint.data.beside import caption_beside, owner_of
from sprint.data.items import BadSample
from sprint.data.kinds.folder import FolderItems
from sprint.data.kinds.webdataset import WebDatasetItems
from sprint.recipe.schema import Data, DataKind
from tests.data.picture_files import noise_bytes
from tests.data.tar.test_samples import plain, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def in_folder(folder, files):
    (folder / "f").mkdir()
    for name, content in files.items():
        (folder / "f" / name).write_bytes(content)
    return FolderItems(Data(kind=DataKind.folder, path=str(folder / "f"), size=8))


def in_tar(folder, files):
    write_tar(folder / "t" / "s.tar", [plain(name, content) for name, content in files.items()])
    return WebDatasetItems(Data(kind=DataKind.webdataset, path=str(folder / "t"), size=8))


KINDS = pytest.mark.parametrize("kind", [in_folder, in_tar])
PICTURE = noise_bytes("PNG")


def drawn(items, times=60):
    draw = np.random.default_rng(0)
    return {items.item(0, draw).caption for _ in range(times)}


def score(name, value):
    return json.dumps({"k": {name: value}}).encode()


@KINDS
@pytest.mark.parametrize(
    ("files", "captions"),
    [
        ({"k.txt": b"a"}, {"a"}),
        ({"k.CAPTION": b"a"}, {"a"}),
        ({"k.txt": b"a", "k.caption": b"no", "k.json": b'{"caption": "no"}'}, {"a"}),
        ({"k.caption": b"a", "k.json": b'{"caption": "no"}'}, {"a"}),
        ({"k.json": b'{"url": "x", "Caption": "a"}'}, {"a"}),
        ({"k.json": b'{"captions": [], "text": "a"}'}, {"a"}),
        ({"k.json": b'["a", "b"]'}, {"a", "b"}),
        ({"k.json": b'"a"'}, {"a"}),
        ({"k.txt": b"\xef\xbb\xbfa\r\nb\r\n"}, {"a\nb"}),
        # Sana's example folder, with and without scores
        ({"k.txt": b"a", "k_Intern.json": score("Intern", "b")}, {"a", "b"}),
        ({"k_Intern.json": score("Intern", "b")}, {"b"}),
        (
            {
                "k.txt": b"a",
                "k_Qwen2.5-VL.json": score("Qwen", "b"),
                "k_Qwen2.5-VL_clip_score.json": score("Qwen", "27.1"),
                "k_prompt_clip_score.json": score("prompt", "-27.1"),
            },
            {"b"},
        ),
        ({"k.txt": b"a", "k_mask.json": b'{"label": "no caption"}'}, {"a"}),
    ],
)
def test_one_rule_for_captions(kind, files, captions, tmp_path):
    items = kind(tmp_path, {"k.png": PICTURE, **files})
    assert len(items) == 1 and drawn(items) == captions


@KINDS
def test_of_several_captions_the_scores_weigh(kind, tmp_path):
    files = {"k.txt": b"a", "k_X.json": score("X", "b")}
    files |= {"k_X_clip_score.json": score("X", 28.0), "k_prompt_clip_score.json": score("prompt", "27.0")}
    items, draw = kind(tmp_path, {"k.png": PICTURE, **files}), np.random.default_rng(0)
    found = [items.item(0, draw).caption for _ in range(300)]
    expected = np.e / (1 + np.e)
    assert abs(found.count("b") / 300 - expected) < 4 * np.sqrt(expected * (1 - expected) / 300)


@KINDS
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"k.json": b'{"url": "x"}'}, "missing caption: has url; expected one of captions, prompt"),
        ({"k.json": b'{"caption": null}'}, "missing caption: caption is null"),
        ({"k.txt": "a".encode("utf-16")}, "unreadable caption: it is UTF-16; save it as UTF-8"),
        ({"k.txt": b"caf\xe9"}, "unreadable caption: it is not UTF-8 text"),
        ({"k.json": b"[" * 10**5}, "unreadable caption: it is not valid JSON"),
        (
            {"k.txt": b"a", "k_clip_score.json": score("prompt", "high")},
            "unreadable caption: a score is no number",
        ),
    ],
)
def test_bad_captions_are_named_alike(kind, files, message, tmp_path):
    with pytest.raises(BadSample, match=message) as caught:
        drawn(kind(tmp_path, {"k.png": PICTURE, **files}))
    assert "\n" not in str(caught.value)


def test_the_owner_is_the_longest_that_begins_the_name():
    owners = {"a", "a_b", "d/x", "d"}
    assert [owner_of(name, owners) for name in ("a_c", "a_b_c_d", "d/x_y", "d_e/x", "b_a")] == [
        *("a", "a_b", "d/x", None, None)
    ]


def test_only_scores_are_no_caption():
    with pytest.raises(BadSample, match=r"missing caption: there are _clip_score\.json"):
        caption_beside({"_clip_score.json": b"{}"}, "k", "k", 1.0, np.random.default_rng(0))


# Tables


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.png", "b.png", "deep/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PICTURE)
    return tmp_path


def captions_of(folder, **settings):
    items = FolderItems(Data(kind=DataKind.folder, path=str(folder), size=8, **settings))
    return [items.item(k, np.random.default_rng(0)).caption for k in range(len(items))]


COCO = {
    "images": [{"id": k, "file_name": f"{name}.png"} for k, name in enumerate("abc")],
    "annotations": [{"image_id": k, "caption": name.upper()} for k, name in enumerate("abc")],
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "metadata.jsonl",
            "".join(
                json.dumps({"file_name": file, "text": text}) + "\n"
                for file, text in [("a.png", "A"), ("b.png", "B"), ("deep/c.png", "C")]
            ),
        ),
        ("metadata.csv", '\ufefffile_name,text\r\n"a.png",A\r\nb.png,"B"\r\n./deep/c.png,C\r\n'),
        ("list.tsv", "image\tcaption\na.png\tA\nb.png\tB\nc.png\tC\n"),
        ("captions.txt", "image,caption\na.png,A\nb.png,B\nc.png,C\n"),
        (
            "metadata.json",
            json.dumps([{"file": n, "prompt": n[0].upper()} for n in ("a.png", "b.png", "c.png")]),
        ),
        ("captions.json", json.dumps({"a": "A", "b.png": {"caption": "B"}, "deep/c": ["C"]})),
        ("captions_val.json", json.dumps(COCO)),
    ],
)
def test_a_table_of_captions(pictures, name, text):
    (pictures / name).write_text(text, encoding="utf-8", newline="")
    assert captions_of(pictures) == ["A", "B", "C"]


def test_what_stands_beside_a_picture_comes_before_a_table(pictures):
    (pictures / "metadata.csv").write_text("file_name,text\na.png,A\nb.png,B\nc.png,C\n")
    (pictures / "a.txt").write_text("own")
    assert captions_of(pictures) == ["own", "B", "C"]


def test_several_rows_are_captions_to_draw_from(pictures):
    (pictures / "captions.csv").write_text(
        "image,caption\n" + "".join(f"{k}.png,{k}{n}\n" for k in "abc" for n in "12")
    )
    items = FolderItems(Data(kind=DataKind.folder, path=str(pictures), size=8))
    assert drawn(items) == {"a1", "a2"}


def test_a_table_without_file_names_is_named_in_the_error(pictures):
    (pictures / "metadata.csv").write_text("id,text\n1,A\n")
    with pytest.raises(
        SprintError, match=r"picture without caption \(3 of 3.*metadata\.csv does not name it in a col"
    ):
        captions_of(pictures)


@pytest.mark.parametrize("content", [b"[" * 10**5, b"\xff\xfe{\0", b'{"file_name": 1e999}\n{', b"\0"])
def test_a_damaged_table_is_refused_in_one_line(pictures, content):
    (pictures / "metadata.jsonl").write_bytes(content)
    with pytest.raises(SprintError, match=r"metadata\.jsonl") as caught:
        captions_of(pictures)
    assert "\n" not in str(caught.value)


# Folders and links


def test_links_to_folders_are_followed_once(pictures, tmp_path_factory):
    for name in "ab":
        (pictures / f"{name}.txt").write_text(name)
    (pictures / "deep/c.txt").write_text("c")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "d.png").write_bytes(PICTURE)
    (elsewhere / "d.txt").write_text("d")
    (elsewhere / "back").symlink_to(pictures)
    for name in ("0first", "again"):
        (pictures / name).symlink_to(elsewhere)
    (pictures / "deep/round").symlink_to(pictures)
    assert sorted(captions_of(pictures)) == ["a", "b", "c", "d"]
    whole = tmp_path_factory.mktemp("other") / "whole"
    whole.symlink_to(pictures)
    assert sorted(captions_of(whole)) == ["a", "b", "c", "d"]


def test_the_home_folder_is_meant(pictures, monkeypatch):
    (pictures / "captions.csv").write_text("image,caption\na.png,A\nb.png,B\nc.png,C\n")
    monkeypatch.setenv("HOME", str(pictures.parent))
    assert captions_of(f"~/{pictures.name}") == ["A", "B", "C"]
    with pytest.raises(SprintError, match=r"^~nobody-here/x: no such folder"):
        captions_of("~nobody-here/x")


@pytest.mark.parametrize("suffix", ["png", "txt"])
def test_a_pipe_among_the_files_is_a_bad_sample(pictures, suffix):
    (pictures / "captions.csv").write_text("image,caption\na.png,A\nb.png,B\nc.png,C\n")
    (pictures / f"d.{suffix}").unlink(missing_ok=True)
    os.mkfifo(pictures / f"d.{suffix}")
    if suffix == "txt":
        (pictures / "d.png").write_bytes(PICTURE)
    else:
        (pictures / "d.txt").write_text("D")
    with pytest.raises(BadSample, match=r"a pipe or a device, not a file"):
        captions_of(pictures)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["x.heic", "x.txt"], r"no pictures there; .*; there are 1 \.heic, 1 \.txt$"),
        (["x.tar"], r"no pictures there; .*; it looks like data\.kind=webdataset$"),
        (["cache.json"], r"no pictures there; .*; it looks like data\.kind=cache$"),
        ([], r"no pictures there; .*; there is nothing$"),
        (
            ["a.png", "x.heic", "x.txt", "a.txt"],
            r"caption without picture .*x\.heic is of no format that is read",
        ),
        (
            ["i/a.png", "c/a.txt"],
            r"picture without caption .*or is it .*c/a\.txt\? They must lie in one folder",
        ),
    ],
)
def test_nothing_found_says_what_is_there(files, message, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SprintError, match=message):
        captions_of(tmp_path)
