"""Latents and embedded text in the layout of Sana's own training code: KEY.npy and KEY.npz."""

import io
import os
import zipfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sprint.base.door import read_bytes
from sprint.base.errors import SprintError
from sprint.data.arrays import BAD_ARRAY, npy_array, npy_header, npz_member
from sprint.data.batch import Encoded
from sprint.data.buckets import CELL, shapes_of
from sprint.data.cache.items import EncodedItems
from sprint.data.cache.shards import ABOUT
from sprint.data.items import BadSample, Reason, said
from sprint.data.pictures import Shape
from sprint.data.tar.samples import TarItems, TarSamples
from sprint.recipe.schema import Data

LATENT, TEXT, NULL = "npy", "npz", "null.npz"
FEATURE, MASK = "caption_feature", "attention_mask"
LARGEST_FILE = 2**28  # bytes
LOOKED_AT = 100  # samples, when a set of shards is opened


class CachedReferenceItems(EncodedItems, TarItems):
    """Samples that were encoded by other means, in order of shard and entry.

    KEY.npy    latent [C, H/32, W/32] or [1, C, H/32, W/32], times the scaling factor already
    KEY.npz    caption_feature [1, T, D]; attention_mask [1, T] or [T], 1 = token (without it all are tokens); in
               the shard, or as a file KEY.npz in the shard's folder
    null.npz   the same of the empty prompt, a file beside the shards
    KEY.json (height, width, prompt) is not needed; its prompt is drawn when the run ends.

    Raises `SprintError` as `TarSamples` does, where text is not there for nearly all latents (data.bad_share),
    and where none of the first samples can be read.
    """

    def __init__(self, data: Data):
        super().__init__(TarSamples(data.path))
        self._shapes = shapes_of(data)
        self._require(data)
        self._first = self._find_first()

    def _encoded(self, index: int) -> Encoded:
        content = self.read(index, (LATENT, TEXT))
        where = self.tar.where(index)
        if LATENT not in content:
            raise BadSample("missing latent", where)
        return Encoded(self._latent(content[LATENT], where), self._text(index, content.get(TEXT), where))

    def _about(self, index: int) -> bytes:
        return self.read(index, (ABOUT,)).get(ABOUT, b"")

    def size(self, index: int) -> Shape:
        """Of the picture that was encoded, by the latent's header."""
        content = self.read(index, (LATENT,), most=2**10)
        where = self.tar.where(index)
        if LATENT not in content:
            raise BadSample("missing latent", where)
        try:
            *_, height, width = npy_header(io.BytesIO(content[LATENT]))[0]
        except BAD_ARRAY as error:
            raise BadSample("unreadable latent", where, said(error)) from error
        if min(height, width) < 1:
            raise BadSample("wrong size", where, f"latent of height {height} and width {width}")
        return height * CELL, width * CELL

    @property
    def has_null(self) -> bool:
        """Whether the empty prompt is there too; Sana's own layout has no place for it."""
        return (self.tar.root / NULL).is_file()

    @cached_property
    def null(self) -> tuple[Tensor, Tensor]:
        """The empty prompt.  -> text [1, T, D], mask [1, T]; raises `SprintError` without a readable null.npz"""
        file = self.tar.root / NULL
        try:
            text, mask = npz_text(read_bytes(file, LARGEST_FILE))
            return text[None], mask[None].long()
        except SprintError as error:
            if file.exists():
                raise
            needed = f"{FEATURE} [1, T, D] and {MASK} [1, T] of the empty prompt"
            raise SprintError(f"{file}: missing; write {needed} there, from the same text encoder") from error
        except BAD_ARRAY as error:
            raise SprintError(f"{file}: cannot be read: {said(error)}") from error

    def _require(self, data: Data) -> None:
        latents, texts = self.tar.having((LATENT,)), self.tar.having((TEXT,))
        if not latents.any():
            raise SprintError(
                f"{data.path}: no latents in these shards; expected KEY.npy and KEY.npz, or what `sprint cache` "
                "makes (for pictures: data.kind = webdataset)"
            )
        alone = np.flatnonzero(latents & ~texts)
        if len(alone) <= data.bad_share * latents.sum():
            return
        if not any(os.path.exists(self._beside(sample)) for sample in alone[:LOOKED_AT].tolist()):
            raise SprintError(
                f"{self.tar.where(alone[0])}: latent without embedded text ({len(alone)} of {latents.sum()}); put "
                f"{self.tar.key(alone[0])}.npz ({FEATURE} [1, T, D], {MASK} [1, T]) into the shard or beside it, "
                "or make a cache of the pictures with `sprint cache`"
            )

    def _find_first(self) -> Encoded:
        problem, tried = None, min(len(self.tar), LOOKED_AT)
        for index in range(tried):
            try:
                return self._encoded(index)
            except BadSample as bad:
                problem = problem or bad
        raise SprintError(f"{problem}; nor can any of the first {tried} samples be used")

    def _latent(self, content: bytes, where: str) -> Tensor:
        try:
            latent = torch.from_numpy(npy_array(content)).float()
        except BAD_ARRAY as error:
            raise BadSample("unreadable latent", where, said(error)) from error
        if latent.ndim == 4 and len(latent) == 1:
            latent = latent[0]
        if (
            latent.ndim != 3
            or not len(latent)
            or (latent.shape[1] * CELL, latent.shape[2] * CELL) not in self._shapes
        ):
            wanted = [f"[C, {height // CELL}, {width // CELL}]" for height, width in self._shapes]
            detail = f"latent {list(latent.shape)}, but data.size wants {wanted[0]}"
            raise BadSample("wrong size", where, detail + f" or {len(wanted) - 1} others" * (len(wanted) > 1))
        return _finite(latent, "NaN latent", where)

    def _text(self, index: int, content: bytes | None, where: str) -> Tensor:
        try:
            if content is None:
                content = read_bytes(self._beside(index), LARGEST_FILE)
            text, mask = npz_text(content)
        except SprintError as error:
            missing = isinstance(error.__cause__, FileNotFoundError)
            raise BadSample("missing text" if missing else "unreadable text", where) from error
        except BAD_ARRAY as error:
            raise BadSample("unreadable text", where, said(error)) from error
        if not mask.any():
            raise BadSample("missing text", where, f"{MASK} is 0 everywhere")
        return _finite(text[mask], "NaN text", where)

    def _beside(self, sample: int) -> Path:
        return self.tar.shard(sample).parent / f"{self.tar.key(sample)}.{TEXT}"


def _finite(tensor: Tensor, reason: Reason, where: str) -> Tensor:
    if not np.isfinite(tensor.numpy()).all():  # many times as fast as torch's
        raise BadSample(reason, where)
    return tensor


def npz_text(content: bytes) -> tuple[Tensor, Tensor]:
    """caption_feature and attention_mask of an .npz.  -> fp32 [T, D], bool [T].  Raises one of `BAD_ARRAY`."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        text = torch.from_numpy(npz_member(archive, FEATURE)).float()
        masked = f"{MASK}.npy" in archive.namelist()
        mask = torch.from_numpy(npz_member(archive, MASK)) if masked else torch.ones(text.shape[-2:-1])
    text = text[0] if text.ndim == 3 and len(text) == 1 else text
    if text.ndim != 2 or not text.shape[1] or mask.numel() != len(text):
        raise ValueError(f"{FEATURE} {list(text.shape)} with {MASK} {list(mask.shape)}")
    return text, mask.flatten() > 0
