"""A cache: latents and embedded text of every sample, made once by `sprint cache`, read by training.

FOLDER/NNNNNN.tar, NNNNNN.json   shards and their records (`sprint.data.shards`)
FOLDER/null.safetensors          text [1, max_length, D] and mask [1, max_length] of the empty prompt
FOLDER/cache.json                `Settings`, and size and SHA-256 of every file above; written last
FOLDER/unfinished.json           `Settings` alone, until then

Reading needs neither the text encoder nor the autoencoder.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.torch
import torch
from pydantic import Field, FiniteFloat, PositiveInt
from safetensors import SafetensorError
from torch import Tensor

from sprint.base.door import held_against, parse_json, read_bytes, read_json, shown
from sprint.base.errors import SprintError
from sprint.base.files import sha256
from sprint.data.batch import Encoded, Trajectory, flat
from sprint.data.cache.shards import ABOUT, TENSORS, tar_path
from sprint.data.items import BadSample, Items, said
from sprint.data.tar.samples import TarSamples
from sprint.recipe.schema import Data, Recipe, Text
from sprint.weights.identity import FAMILY_PARTS, family_weights

log = logging.getLogger(__name__)
FORMAT = 1
MOST_SAMPLES = 10**10
LARGEST_NULL = 2**28  # bytes
STORED = (torch.float32, torch.bfloat16, torch.float16)  # what a latent may be stored in
CACHE, UNFINISHED, NULL = "cache.json", "unfinished.json", "null.safetensors"


@dataclass(frozen=True)
class Size:
    """Of a sample's picture, in pixels."""

    height: PositiveInt
    width: PositiveInt


@dataclass(frozen=True)
class Captioned:
    """What a sample's KEY.json says of its caption."""

    prompt: str


@dataclass(frozen=True)
class Listed:
    """A file as cache.json lists it."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a cache.

    family      where text encoder and autoencoder came from
    weights     SHA-256 of what encoded, by part
    text, data  of the recipe, as far as they decide what is encoded; a path in full
    precision   of encoding; dtype: of what is stored
    scaling_factor, downscale   of the autoencoder: latent = factor · encoding; pixels per latent cell
    samples     of the source, good and bad
    in_order    position p is sample p mod N, as in the source itself; else every epoch is shuffled
    times       of whole trajectories, from noise to 0; guidance: the scales, of which each has one; none of either
                where there are latents alone
    """

    family: str
    weights: dict[str, str]
    text: dict[str, Any]
    data: dict[str, Any]
    precision: str
    dtype: str
    scaling_factor: FiniteFloat
    downscale: PositiveInt
    samples: Annotated[int, Field(ge=0, le=MOST_SAMPLES)]
    shard_size: PositiveInt
    in_order: bool
    times: list[FiniteFloat] = field(default_factory=list)
    guidance: list[FiniteFloat] = field(default_factory=list)
    format: int = FORMAT

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_size)


def read_settings(path: Path) -> tuple[Settings, dict]:
    """-> the settings in a cache.json or unfinished.json, and the whole file. Raises SprintError."""
    try:
        content = read_json(path)
        settings = content.get("settings", {})
        if isinstance(settings, dict) and settings.get("format", FORMAT) != FORMAT:
            raise SprintError(
                f"{path}: format {shown(settings['format'])} of another version of sprint; this reads {FORMAT}"
            )
        return held_against(Settings, settings, path), content
    except SprintError as error:
        raise SprintError(f"{error}; make the cache anew with `sprint cache`") from error


def differences(ours: Mapping, theirs: Mapping, prefix: str = "") -> Iterator[str]:
    """ "text.max_length = 300, there 20" for every key, also of groups, whose values differ."""
    for key in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            yield from differences(mine, other, f"{prefix}{key}.")
        elif mine != other:
            yield f"{prefix}{key} = {mine}, there {other}"


# ---- reading ----------------------------------------------------------------------------------------


class EncodedItems(Items):
    """Samples that were encoded before, all with as many channels and texts as wide as the first."""

    _first: Encoded  # the first sample that can be read

    def caption(self, index: int, draw: np.random.Generator) -> str:
        """What KEY.json says; training does not need it."""
        try:
            about = parse_json(self._about(index), "its .json")
            caption = held_against(Captioned, about, "its .json").prompt.strip()
        except SprintError as error:
            raise BadSample("unreadable caption", self.where(index), str(error)) from error
        if not caption:
            raise BadSample("empty caption", self.where(index))
        return caption

    def _about(self, index: int) -> bytes:
        """Of sample number `index` the KEY.json; empty where there is none. Raises `BadSample`."""
        raise NotImplementedError

    def item(self, index: int, draw: np.random.Generator) -> Encoded:
        """As stored. `draw` is not used: there is one text."""
        encoded = self._encoded(index)
        check_widths(encoded, self._first, self.where(index))
        return encoded

    def _encoded(self, index: int) -> Encoded:
        """Sample number `index`, whatever its widths. Raises `BadSample`."""
        raise NotImplementedError

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of the first sample that can be read. Raises SprintError where there is none."""
        return tuple(self._first.latent.shape)

    @property
    def text_width(self) -> int:
        """D of the first sample's text [T, D]. Raises SprintError as `latent_shape` does."""
        return self._first.text.shape[1]


class CachedItems(EncodedItems):
    """The samples of a cache's folder (data.path), without those that were skipped when it was made.

    Opening compares the size of every file with what was written; `verify` compares hashes. Raises SprintError
    for a cache that is unfinished or damaged, or that holds pictures of another size than the recipe's.
    """

    def __init__(self, data: Data):
        self.folder = Path(data.path)
        self.settings, content = _open(self.folder)
        for file, size, _ in _files(self.folder, content):
            _check_size(file, size)
        wanted = {"size": data.size, "aspect_buckets": data.aspect_buckets}
        held = {key: self.settings.data.get(key) for key in wanted}
        if differs := ", ".join(differences(wanted, held, "data.")):
            raise SprintError(f"{self.folder}: another recipe's cache: {differs}; set what is there")
        self.in_order = self.settings.in_order
        self._tar = TarSamples(self.folder)
        if len(self._tar) != (written := content.get("samples")):
            raise SprintError(
                f"{self.folder}: {len(self._tar)} samples in its shards, {written} in {CACHE}; move away what does "
                "not belong there, or find the damage with `sprint cache RECIPE --verify`"
            )

    def __len__(self) -> int:
        return len(self._tar)

    def where(self, index: int) -> str:
        return self._tar.where(index)

    @property
    def fingerprint(self) -> str:
        return self._tar.fingerprint

    def _encoded(self, index: int) -> Encoded:
        where = self.where(index)
        try:
            tensors = safetensors.torch.load(self._tar.read(index, (TENSORS,))[TENSORS])
            trajectory = Trajectory(*map(tensors.get, Trajectory._fields)) if self.settings.times else None
            encoded = Encoded(tensors["latent"], tensors["text"], trajectory)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise BadSample("unreadable latent", where, said(error)) from error
        self._check_values(encoded, where)
        return encoded

    def _check_values(self, encoded: Encoded, where: str) -> None:
        """Raises BadSample."""
        tensors = flat(encoded)
        if other := [x.dtype for x in tensors.values() if x.dtype not in STORED]:
            raise BadSample("unreadable latent", where, f"numbers of {other[0]}")
        if encoded.latent.ndim != 3 or encoded.text.ndim != 2 or not all(x.numel() for x in tensors.values()):
            raise BadSample("wrong size", where, f"{[list(x.shape) for x in tensors.values()]}")
        if encoded.trajectory:
            steps, shape = len(self.settings.times) - 1, encoded.latent.shape
            expected = {"states": (steps, *shape), "velocity": (steps, *shape), "t": (steps,), "guidance": ()}
            found = {name: tuple(x.shape) for name, x in flat(encoded.trajectory).items()}
            if found != expected:
                raise BadSample("wrong size", where, f"trajectory {found}")
        for name, x in tensors.items():
            if not x.isfinite().all():
                raise BadSample("NaN text" if name == "text" else "NaN latent", where)

    def _about(self, index: int) -> bytes:
        return self._tar.read(index, (ABOUT,)).get(ABOUT, b"")

    def size(self, index: int) -> tuple[int, int]:
        try:
            about = parse_json(self._about(index), "its .json")
            size = held_against(Size, about, "its .json")
        except SprintError as error:
            raise BadSample("wrong size", self.where(index), str(error)) from error
        return size.height, size.width

    @cached_property
    def _first(self) -> Encoded:
        """The first sample that can be read, which says what the others are."""
        for index in range(len(self)):
            try:
                return self._encoded(index)
            except BadSample:
                continue
        raise SprintError(f"{self.folder}: none of its samples can be read; make the cache anew")

    has_null = True

    @property
    def null(self) -> tuple[Tensor, Tensor]:
        """The empty prompt, as `encode_null` gives it.  -> text [1, max_length, D] in fp32, mask [1, max_length]"""
        path = self.folder / NULL
        try:
            tensors = safetensors.torch.load(read_bytes(path, LARGEST_NULL))
            text, mask = tensors["text"].float(), tensors["mask"].long()
            if text.ndim != 3 or mask.shape != text.shape[:2] or not text.isfinite().all():
                raise ValueError(f"text {list(text.shape)} with mask {list(mask.shape)}")
            return text, mask
        except (SafetensorError, SprintError, KeyError, ValueError, RuntimeError) as error:
            raise SprintError(f"{path}: cannot be read: {said(error)}; make the cache anew") from error

    def check(self, family: str, text: Text) -> None:
        """Raise SprintError unless this text side and this autoencoder made the cache.

        family   of the recipe (teacher_family, or teacher): compared by its weights, and by name alone where
                 these are not on this machine
        """
        settings = self.settings
        differs = list(differences(asdict(text), settings.text, "text."))
        weights = family_weights(family)
        if weights is None and family != settings.family:
            differs.append(f"family = {family}, there {settings.family}")
        elif weights is None:
            log.warning("%s: compared with %s by name only, whose files are not here", family, self.folder)
        else:
            made_by = {part: settings.weights.get(part) for part in FAMILY_PARTS}
            other = [part for part in FAMILY_PARTS if weights[part] != made_by[part]]
            if other:
                differs.append(f"other weights in {' and '.join(other)} of {family} than made it")
        if differs:
            raise SprintError(
                f"{self.folder}: another recipe's cache: {', '.join(differs)}; "
                "set what is there, or make another cache with `sprint cache`"
            )


def check_trajectories(items: Items, recipe: Recipe) -> None:
    """Raise SprintError unless the recipe learns from no trajectories, or these samples have such as it says."""
    path, wanted = recipe.data.path, recipe.distill.trajectories
    if not wanted.states:
        return
    settings = items.settings if isinstance(items, CachedItems) else None
    if not settings or not settings.times:
        raise SprintError(
            f"{path}: it holds latents alone, but distill.trajectories.states = {wanted.states}; "
            "make another cache with `sprint cache RECIPE --trajectories`, or set that to 0"
        )
    ours = {
        "trajectories.steps": wanted.steps,
        "guidance_scales": sorted(set(recipe.distill.guidance_scales)),
    }
    theirs = {
        "trajectories.steps": len(settings.times) - 1,
        "guidance_scales": sorted(set(settings.guidance)),
    }
    if differs := ", ".join(differences(ours, theirs, "distill.")):
        raise SprintError(f"{path}: other trajectories than the recipe's: {differs}; set what is there")


def check_widths(encoded: Encoded, first: Encoded, where: str) -> None:
    """Raise BadSample unless latents have as many channels, and texts are as wide, as the first sample's."""
    found, expected = ((len(one.latent), one.text.shape[1]) for one in (encoded, first))
    if found != expected:
        detail = "{} channels and text of {}, but the first sample has {} and {}"
        raise BadSample("wrong size", where, detail.format(*found, *expected))


def verify(folder: Path, rank: int = 0, processes: int = 1) -> Iterator[Path]:
    """Read a cache's files back, or this process's share of them; gives each that is as it was written.

    These are the shards, their records and the empty prompt.

    Raises SprintError that names the first that is not.
    """
    _, content = _open(folder)
    files = [*_files(folder, content), *_files(folder, content, "records")]
    for file, size, digest in files[rank::processes]:
        _check_size(file, size)
        if sha256(file) != digest:
            raise SprintError(
                f"{file}: damaged: its SHA-256 is not the one in {CACHE}; "
                "delete it and run the same `sprint cache` without --verify"
            )
        yield file


def _open(folder: Path) -> tuple[Settings, dict]:
    if (folder / CACHE).exists():
        return read_settings(folder / CACHE)
    if (folder / UNFINISHED).exists():
        settings, _ = read_settings(folder / UNFINISHED)
        there = sum(tar_path(folder, number).exists() for number in range(settings.shards))
        raise SprintError(
            f"{folder}: unfinished: {there} of {settings.shards} shards; run the same `sprint cache` to go on"
        )
    problem = "no cache.json there" if folder.is_dir() else "no such folder"
    raise SprintError(f"{folder}: {problem}; set data.path to what `sprint cache` made")


def _files(folder: Path, content: dict, listed: str = "files") -> list[tuple[Path, int, str]]:
    """(file, its size, its SHA-256) of the "files" that training reads, or of the "records" of its shards."""
    try:
        files = held_against(list[Listed], content.get(listed), f"{folder / CACHE}: {listed}")
    except SprintError as error:
        raise SprintError(f"{error}; make the cache anew") from error
    for file in files:
        if Path(file.name).name != file.name or "\0" in file.name:
            raise SprintError(
                f"{folder / CACHE}: {shown(file.name)} is not a file of the cache; make it anew"
            )
    return [(folder / file.name, file.bytes, file.sha256) for file in files]


def _check_size(file: Path, size: int) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found != size:
        problem = "missing" if found is None else f"{found} bytes, {size} in {CACHE}"
        raise SprintError(f"{file}: {problem}; run the same `sprint cache` to make it anew")
