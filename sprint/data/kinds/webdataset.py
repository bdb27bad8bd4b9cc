"""WebDataset shards of pictures: KEY.jpg, .jpeg, .png or .webp with KEY.json or KEY.txt."""

import io
import json
from collections.abc import Mapping

import numpy as np

from sprint.base.errors import SprintError
from sprint.data.batch import Sample
from sprint.data.buckets import shapes_of
from sprint.data.captions import caption_from
from sprint.data.items import BadSample, said
from sprint.data.pictures import SUFFIXES, Shape, picture_from, size_from
from sprint.data.tar.samples import TarItems, TarSamples
from sprint.recipe.schema import Data

PICTURES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
CAPTIONS = ("captions", "prompt", "caption", "text")  # of KEY.json; the first that is there is meant
SCORES = "_clip_score.json"
HEAD = 2**16  # bytes that hold nearly every picture's header


class WebDatasetItems(TarItems):
    """Pictures in shards, in order of shard and entry.

    KEY.json   {"prompt": "…"}, or "caption" or "text"; or {"captions": ["…", …], "clip_scores": [31.2, …]}, of
               which one is drawn. "height" and "width" are not asked: they may be from before EXIF's turn
    KEY.txt    the caption, if KEY.json has none

    More captions may stand beside SHARD.tar, as Sana has them, in any number of
    SHARD.json, SHARD_ANY.json   {KEY: {NAME: caption}}; NAME "prompt" there stands for _ANY
    SHARD_ANY_clip_score.json    {KEY: {NAME: score}}; NAME is one of those, a text in KEY.json, or "prompt" for
                                 the caption that the shard itself has
    Of captions with scores one is drawn by its score, those without stand back; without any score all are alike.
    Scores are used as they stand, and data.caption_temperature is in their units: Sana writes 100 times the cosine.

    Raises `SprintError` as `TarSamples` does, and for shards without pictures.
    """

    def __init__(self, data: Data):
        super().__init__(TarSamples(data.path, sidecars=True))
        self._data, self._shapes = data, shapes_of(data)
        if not self.tar.having(PICTURES).any():
            hint = "expected KEY.jpg, .png or .webp"
            if self.tar.having(("npy", "safetensors")).any():
                hint = "these hold latents: set data.kind = cache"
            raise SprintError(f"{data.path}: no pictures in these shards; {hint}")
        self._beside = [suffix for suffix in self.tar.all_suffixes if suffix.startswith("/")]
        self._all = {*PICTURES, "json", "txt", *self._beside}

    def item(self, index: int, draw: np.random.Generator) -> Sample:
        content = self.read(index, self._all)
        where = self.tar.where(index)
        caption = caption_from(self._caption(content, where), where, self._data.caption_temperature, draw)
        picture = content[_picture_among(content, where)]
        return Sample(picture_from(io.BytesIO(picture), self._shapes, where), caption)

    def size(self, index: int) -> Shape:
        head = self.read(index, PICTURES, most=HEAD)
        where = self.tar.where(index)
        suffix = _picture_among(head, where)
        try:
            return size_from(io.BytesIO(head[suffix]), where)
        except BadSample:  # a long profile or preview may stand before the size
            return size_from(io.BytesIO(self.read(index, (suffix,))[suffix]), where)

    def _caption(self, content: Mapping[str, bytes], where: str) -> object:
        """What `caption_from` chooses from."""
        about = _object(content.get("json", b"{}"), where)
        key = next((key for key in CAPTIONS if about.get(key) is not None), None)
        own = about.get(key)
        if own is None and "txt" in content:
            own = _text(content["txt"], where)
        named, scores = self._named(content, where)
        if not named and not scores:
            return {"captions": own, "clip_scores": about.get("clip_scores") if key == "captions" else None}
        texts = {"prompt": own} | {key: text for key, text in about.items() if isinstance(text, str)} | named
        scored = [name for name in scores if isinstance(texts.get(name), str)]
        if scored:
            return {"captions": [texts[n] for n in scored], "clip_scores": [scores[n] for n in scored]}
        own = own if isinstance(own, list) else [own] if own is not None else []
        return {"captions": [*own, *named.values()]}

    def _named(self, content: Mapping[str, bytes], where: str) -> tuple[dict[str, str], dict[str, float]]:
        """Captions and scores by NAME, from the files beside the shard."""
        named, scores = {}, {}
        for suffix in self._beside:
            values = _object(content.get(suffix, b"{}"), where)
            if suffix.endswith(SCORES):
                scores |= {name: _number(score, where) for name, score in values.items()}
                continue
            texts = {name: text for name, text in values.items() if isinstance(text, str)}
            if "prompt" in texts:  # not to be taken for the shard's own
                texts[suffix[1:].removesuffix(".json")] = texts.pop("prompt")
            named |= texts
        return named, scores


def _picture_among(content: Mapping[str, bytes], where: str) -> str:
    for suffix in PICTURES:
        if suffix in content:
            return suffix
    raise BadSample("missing picture", where)


def _object(content: bytes, where: str) -> dict:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSample("unreadable caption", where, said(error)) from error
    if not isinstance(value, dict):
        raise BadSample("unreadable caption", where, "not a JSON object")
    return value


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("unreadable caption", where, said(error)) from error


def _number(value: object, where: str) -> float:
    try:
        return float(value)  # Sana writes them as text
    except (TypeError, ValueError, OverflowError) as error:
        raise BadSample("unreadable caption", where, f"a score is no number: {said(error)}") from error
