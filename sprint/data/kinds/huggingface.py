"""A dataset of the `datasets` library: on the hub, a folder of `save_to_disk`, or a folder of its files.

Nothing of it is executed: since version 4 the library runs no loading scripts.
"""

import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from sprint.base.errors import SprintError
from sprint.data.batch import Sample
from sprint.data.buckets import shapes_of
from sprint.data.captions import caption_from, field_of
from sprint.data.items import BadSample, Items, Reason, said
from sprint.data.pictures import Shape, picture_from, size_from
from sprint.data.tables import FILES
from sprint.data.walk import nothing_found
from sprint.recipe.schema import Data

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)
SPLIT = "train"


class HuggingFaceItems(Items):
    """Rows of the split "train", or of the only one there is. data.path names a folder here or a hub id.

    Pictures may be a column of images, bytes or paths; captions of texts, or of lists of texts to draw from. Without
    columns "image" and "text", and none named in the recipe, the first of `FILES` and of `captions.FIELDS` are taken.
    Raises `SprintError` if the dataset cannot be had, or has no such columns.
    """

    def __init__(self, data: Data):
        self._data, self._shapes = data, shapes_of(data)
        rows = _load(data)
        image = _column(rows, data, "image_column", [name for name in FILES if name in rows.column_names])
        caption = _column(rows, data, "caption_column", [field_of(rows.column_names)])
        rows = _undecoded(rows.with_format(None), image)
        self._pictures = rows.select_columns([image])
        self._captions = rows.select_columns([caption])

    def __len__(self) -> int:
        return len(self._pictures)

    def item(self, index: int, draw: np.random.Generator) -> Sample:
        where = self.where(index)
        caption = self._value(self._captions, index, "unreadable caption")
        caption = caption_from(caption, where, self._data.caption_temperature, draw)
        return Sample(picture_from(self.picture(index), self._shapes, where), caption)

    def size(self, index: int) -> Shape:
        return size_from(self.picture(index), self.where(index))

    def picture(self, index: int) -> str | BinaryIO:
        """A path, or the bytes, whatever the column holds them in."""
        value = self._value(self._pictures, index, "unreadable picture")
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if value is None:
            raise BadSample("missing picture", self.where(index))
        if isinstance(value, str):
            return value
        if isinstance(value, bytes):
            return io.BytesIO(value)
        raise BadSample("unreadable picture", self.where(index), "neither an image nor bytes nor a path")

    def where(self, index: int) -> str:
        return f"{self._data.path}, row {index}"

    def _value(self, column: "Dataset", index: int, problem: Reason) -> object:
        """What a row holds in the one column that is there."""
        try:
            (value,) = column[index].values()
        except Exception as error:  # of the library, of pyarrow or of the file system
            raise BadSample(problem, self.where(index), said(error)) from error
        return value


def _column(rows: "Dataset", data: Data, key: str, others: list[str | None]) -> str:
    """The column that data.KEY names; of a recipe that leaves it as it is, else the first of `others`."""
    name = getattr(data, key)
    if name in rows.column_names:
        return name
    if name == getattr(Data, key) and others and others[0]:
        log.warning("%s: data.%s=%s, since there is no column %s", data.path, key, others[0], name)
        return others[0]
    raise SprintError(
        f"{data.path}: no column {name!r}, which data.{key} names; there are {', '.join(rows.column_names)}"
    )


def _load(data: Data) -> "Dataset":
    path = data.path
    try:
        import datasets
    except ImportError as error:
        raise SprintError(
            "data.kind = huggingface needs a library: pip install 'sprint-distill[data]'"
        ) from error
    saved = any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        found = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except Exception as error:  # a damaged file fails wherever the library first trips over it
        raise SprintError(
            f"{path}: no dataset to be had; set data.path to a hub id, a folder of save_to_disk with rows in it, "
            f"or one of parquet or image files{nothing_found(data)} ({type(error).__name__}: {said(error)})"
        ) from error
    if isinstance(found, datasets.Dataset):
        return found
    if SPLIT not in found and len(found) != 1:
        raise SprintError(f"{path}: no split {SPLIT!r}; there are {', '.join(found)}")
    return found[SPLIT] if SPLIT in found else next(iter(found.values()))


def _undecoded(rows: "Dataset", column: str) -> "Dataset":
    """Images as bytes or paths: they are decoded here as those of every other source."""
    from datasets import Image

    decoded = isinstance(rows.features[column], Image)
    return rows.cast_column(column, Image(decode=False)) if decoded else rows
