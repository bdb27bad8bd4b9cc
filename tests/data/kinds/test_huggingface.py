"""Datasets of the `datasets` library: how they lie on disk, what their columns hold, what they lack."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from sprint.base.errors import SprintError
from sprint.data.items import BadSample
from sprint.data.kinds.huggingface import HuggingFaceItems
from sprint.data.source import open_source
from sprint.recipe.schema import Data, DataKind

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(level, size=(12, 6)):
    file = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(file, "PNG")
    return file.getvalue()


def rows(count=5):
    """`image`, `bytes` and `file` hold the same picture, of level k in row k."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "bytes": datasets.Value("binary"),
            "text": datasets.Value("string"),
            "texts": [datasets.Value("string")],
        }
    )
    columns = {
        "image": [{"bytes": png(k), "path": None} for k in range(count)],
        "bytes": [png(k) for k in range(count)],
        "text": [f"caption {k}" for k in range(count)],
        "texts": [[f"one of {k}", f"other of {k}"] for k in range(count)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def items_of(path, **settings):
    settings = {"kind": DataKind.huggingface, "path": str(path), "size": 8, "bad_share": 0.5, **settings}
    return HuggingFaceItems(Data(**settings))


def take(items):
    samples = [items.item(k, np.random.default_rng(k)) for k in range(len(items))]
    return [(int(s.picture[0, 0, 0]), s.caption) for s in samples]


EXPECTED = [(k, f"caption {k}") for k in range(5)]


def to_disk(path):
    rows().save_to_disk(path)


def dict_to_disk(path):
    datasets.DatasetDict({"test": rows(2), "train": rows()}).save_to_disk(path)


def one_other_split(path):
    datasets.DatasetDict({"everything": rows()}).save_to_disk(path)


def parquet(path):
    path.mkdir()
    rows().to_parquet(path / "data.parquet")


def image_folder(path):
    path.mkdir()
    lines = [f'{{"file_name": "{k}.png", "text": "caption {k}"}}' for k in range(5)]
    (path / "metadata.jsonl").write_text("\n".join(lines))
    for k in range(5):
        (path / f"{k}.png").write_bytes(png(k))


@pytest.mark.parametrize("write", [to_disk, dict_to_disk, one_other_split, parquet, image_folder])
def test_every_layout_on_disk(tmp_path, write):
    write(tmp_path / "d")
    items = items_of(tmp_path / "d")
    assert len(items) == 5 and take(items) == EXPECTED
    assert items.size(0) == (6, 12)


@pytest.mark.parametrize("column", ["image", "bytes"])
def test_columns_are_those_of_the_recipe(tmp_path, column):
    to_disk(tmp_path / "d")
    items = items_of(tmp_path / "d", image_column=column, caption_column="texts")
    drawn = [take_one for seed in range(10) for take_one in [items.item(3, np.random.default_rng(seed))]]
    assert {sample.caption for sample in drawn} == {"one of 3", "other of 3"}
    assert drawn[0].picture[0, 0].tolist() == [3, 3, 3] and drawn[0].picture.shape == (8, 8, 3)


def test_pictures_by_path(tmp_path):
    (tmp_path / "a.png").write_bytes(png(7))
    datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")], "text": ["a"]}).save_to_disk(
        tmp_path / "d"
    )
    assert take(items_of(tmp_path / "d")) == [(7, "a")]


def test_as_a_source_it_is_read_by_several_threads(tmp_path):
    to_disk(tmp_path / "d")
    source = open_source(Data(kind=DataKind.huggingface, path=str(tmp_path / "d"), size=8, seed=2))
    expected = [s.caption for s in source.samples(range(200))]
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda k: source.samples(range(10 * k, 10 * k + 10)), range(20)))
    samples = [s for part in parts for s in part]
    assert [s.caption for s in samples] == expected
    assert all(s.caption == f"caption {s.picture[0, 0, 0]}" for s in samples)


def test_bad_rows_are_named(tmp_path):
    columns = {
        "image": [{"bytes": b"<html>", "path": None}, None, {"bytes": png(2), "path": None}],
        "text": ["a", "b", None],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "d")
    items = items_of(tmp_path / "d")
    for row, reason in enumerate(("unreadable picture", "missing picture", "missing caption")):
        with pytest.raises(BadSample) as caught:
            items.item(row, np.random.default_rng(0))
        assert caught.value.where == f"{tmp_path / 'd'}, row {row}" and caught.value.reason == reason


@pytest.mark.parametrize(
    ("key", "there"), [("image_column", "image, bytes, text"), ("caption_column", "text")]
)
def test_missing_columns_name_those_that_are_there(tmp_path, key, there):
    to_disk(tmp_path / "d")
    with pytest.raises(
        SprintError, match=rf"^{tmp_path}/d: no column 'no', which data.{key} names; .*{there}"
    ):
        items_of(tmp_path / "d", **{key: "no"})


def test_a_column_of_something_else_holds_bad_samples(tmp_path):
    datasets.Dataset.from_dict({"image": [3], "text": ["a"]}).save_to_disk(tmp_path / "d")
    with pytest.raises(BadSample, match="row 0: unreadable picture: neither an image nor bytes nor a path"):
        take(items_of(tmp_path / "d"))


def test_no_split_to_train_on(tmp_path):
    datasets.DatasetDict({"a": rows(1), "b": rows(1)}).save_to_disk(tmp_path / "d")
    with pytest.raises(SprintError, match=rf"^{tmp_path}/d: no split 'train'; there are a, b$"):
        items_of(tmp_path / "d")


def test_a_dataset_that_is_not_to_be_had(tmp_path, monkeypatch):
    with pytest.raises(
        SprintError, match=rf"^{tmp_path}/none: no dataset to be had; set data.path to a hub id"
    ):
        items_of(tmp_path / "none")
    to_disk(tmp_path / "d")

    def offline(path):
        raise ConnectionError("Couldn't reach 'some/dataset' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        SprintError,
        match=r"^some/dataset: no dataset .*\(ConnectionError: Couldn't reach 'some/dataset' on the Hub\)$",
    ):
        items_of("some/dataset")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", b"{}"),
        ("state.json", b"[1]"),
        ("dataset_info.json", b'{"features": 5}'),
        ("data-00000-of-00001.arrow", b"ARROW1"),
    ],
)
def test_a_damaged_dataset_is_refused_in_one_line(tmp_path, file, content):
    to_disk(tmp_path / "d")
    assert (tmp_path / "d" / file).is_file()
    (tmp_path / "d" / file).write_bytes(content)
    with pytest.raises(SprintError, match=rf"^{tmp_path}/d: no dataset to be had; .*\(\w+: .*\)$") as caught:
        items_of(tmp_path / "d")
    assert caught.value.__cause__ is not None


def test_a_dataset_without_rows_is_refused(tmp_path):
    datasets.Dataset.from_dict({"image": [], "text": []}).save_to_disk(tmp_path / "d")
    with pytest.raises(SprintError, match=rf"^{tmp_path}/d: no dataset to be had; .* with rows in it"):
        items_of(tmp_path / "d")


def test_a_row_that_cannot_be_read_is_a_bad_sample(tmp_path, monkeypatch):
    to_disk(tmp_path / "d")
    items = items_of(tmp_path / "d")

    def fail(rows, index):
        raise KeyError("a block is gone")

    monkeypatch.setattr(datasets.Dataset, "__getitem__", fail)
    where = rf"^{tmp_path}/d, row 3: "
    with pytest.raises(BadSample, match=where + "unreadable caption: 'a block is gone'$"):
        items.item(3, np.random.default_rng(0))
    with pytest.raises(BadSample, match=where + "unreadable picture: 'a block is gone'$"):
        items.size(3)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SprintError, match=r"pip install 'sprint-distill\[data\]'$"):
        items_of("some/dataset")
