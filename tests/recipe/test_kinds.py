"""Which kind of data a path looks like, and what a recipe says of a path or an option that its kind does not read."""

import pytest

from sprint.base.errors import SprintError
from sprint.recipe.kinds import kind_of
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import DataKind


@pytest.mark.parametrize(
    ("files", "path", "kind"),
    [
        (["a.png", "a.txt"], "", "folder"),
        (["deep/er/s-000.tar"], "", "webdataset"),
        (["cache.json", "000000.tar"], "", "cache"),
        (["unfinished.json"], "", "cache"),
        (["dataset_dict.json", "train/data.arrow"], "", "huggingface"),
        (["data/train.parquet"], "", "huggingface"),
        (["p.jsonl"], "/p.jsonl", "prompts"),
        (["s.tar"], "/s.tar", "webdataset"),
        ([], "/s-{000..009}.tar", "webdataset"),
        (["s.tar.gz"], "/s.tar.gz", "webdataset"),
        (["s-000.tar.zst", "s-001.tar.zst"], "", "webdataset"),
        (["train.parquet"], "/train.parquet", "huggingface"),
        ([], "/none", None),
        (["a.png"], "/a.png", None),
    ],
)
def test_kinds_by_their_names(tmp_path, files, path, kind):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert kind_of(f"{tmp_path}{path}") == (kind and DataKind(kind))


def test_kinds_of_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert kind_of("someone/pictures") is DataKind.huggingface
    assert kind_of("pictures") is None and kind_of("a\0b") is None and kind_of("a" * 5000) is None
    (tmp_path / "someone").mkdir()
    assert kind_of("someone/pictures") is None  # a folder here, misspelt


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.path=pics"],
            r"data\.path = pics, but scenes .* it looks like folder: set data\.kind=folder$",
        ),
        (
            ["data.path=none"],
            r"data\.path = none, but .* nothing is there, and data\.kind must say what it holds: f",
        ),
        (["data.path=me/pics"], r"it looks like a dataset's name on the hub: set data\.kind=huggingface$"),
        (
            ["data.caption_temperature=2"],
            r"data\.caption_temperature = 2.0, but data\.kind = scenes does not read it",
        ),
        (
            ["data.kind=folder", "data.path=pics", "evaluate.prompts=0", "data.caption_column=caption"],
            r"data\.caption_column = caption, but data\.kind = folder does not read it \(only huggingface\)",
        ),
        (
            ["data.kind=folder", "data.path=pics", "evaluate.prompts=0", "data.teacher_steps=5"],
            r"data\.teacher_steps = 5, but .* set data\.kind, or leave it at 20$",
        ),
    ],
)
def test_what_is_set_and_not_read_is_refused(tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics").mkdir()
    with pytest.raises(SprintError, match=message):
        load_recipe("tiny", overrides)


def test_the_home_folder_is_meant_everywhere(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    data = load_recipe("0.6b", ["data.path=~/pics/x-{000..015}.tar", "data.kind=webdataset"]).data
    assert data.path == "/home/me/pics/x-{000..015}.tar"
