"""WebDataset shards of pictures: KEY.jpg or another of `SUFFIXES`, with KEY.txt, KEY.caption or KEY.json."""

import io
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from sprint.base.door import shown
from sprint.base.errors import SprintError
from sprint.data.batch import Sample
from sprint.data.beside import OWN, caption_beside
from sprint.data.buckets import shapes_of
from sprint.data.items import BadSample
from sprint.data.pictures import SUFFIXES, Shape, picture_from, size_from
from sprint.data.tar.samples import TarItems, TarSamples
from sprint.recipe.schema import Data

PICTURES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
HEAD = 2**16  # bytes that hold nearly every picture's header


class WebDatasetItems(TarItems):
    """Pictures in shards, in order of shard and entry, with the captions that `sprint.data.beside` finds.

    "height" and "width" of a KEY.json are not asked: they may be from before EXIF's turn.

    Raises `SprintError` as `TarSamples` does, and for shards without pictures.
    """

    def __init__(self, data: Data):
        super().__init__(TarSamples(data.path, sidecars=True))
        self._data, self._shapes = data, shapes_of(data)
        if not self.tar.having(PICTURES).any():
            hint = f"expected KEY.jpg, .png or another of {', '.join(PICTURES)}"
            if self.tar.having(("npy", "safetensors")).any():
                hint = "these hold latents: set data.kind = cache"
            raise SprintError(
                f"{data.path}: no pictures in these shards ({', '.join(map(shown, self.tar.all_suffixes[:8]))}); {hint}"
            )
        self._captions = {
            *OWN,
            *(s for s in self.tar.all_suffixes if s[0] in "_/" and s.endswith(".json")),
        }
        self._all = {*PICTURES, *self._captions}

    def item(self, index: int, draw: np.random.Generator) -> Sample:
        content = self.read(index, self._all)
        where = self.tar.where(index)
        picture = content[self._picture_among(content, index)]
        beside = {suffix: member for suffix, member in content.items() if suffix in self._captions}
        if not beside:
            raise BadSample("missing caption", where, self._there(index))
        key = self.tar.key(index).rpartition("/")[2]
        caption = caption_beside(beside, key, where, self._data.caption_temperature, draw)
        return Sample(picture_from(io.BytesIO(picture), self._shapes, where), caption)

    def picture(self, index: int) -> BinaryIO:
        content = self.read(index, PICTURES)
        return io.BytesIO(content[self._picture_among(content, index)])

    def size(self, index: int) -> Shape:
        head = self.read(index, PICTURES, most=HEAD)
        where = self.tar.where(index)
        suffix = self._picture_among(head, index)
        try:
            return size_from(io.BytesIO(head[suffix]), where)
        except BadSample:  # a long profile or preview may stand before the size
            return size_from(io.BytesIO(self.read(index, (suffix,))[suffix]), where)

    def _picture_among(self, content: Mapping[str, bytes], index: int) -> str:
        for suffix in PICTURES:
            if suffix in content:
                return suffix
        raise BadSample("missing picture", self.tar.where(index), self._there(index))

    def _there(self, index: int) -> str:
        return f"there are {', '.join(map(shown, self.tar.suffixes(index)[:8]))}"
