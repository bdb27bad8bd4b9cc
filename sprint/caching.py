"""`sprint cache`: every sample of a recipe through the frozen family once, into shards that training reads.

Process r of W makes shards r, r + W, … and needs no word from the others: whoever finds the last one in place
writes cache.json. What is whole is kept, so the same command goes on where it stopped.
"""

import fcntl
import json
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from tqdm import tqdm

from sprint.convert.convert import DTYPES
from sprint.data.bad import BadSamples
from sprint.data.batch import Item, Sample, parts
from sprint.data.cache import (
    CACHE,
    NULL,
    UNFINISHED,
    Settings,
    differences,
    read_settings,
    verify,
)
from sprint.data.items import BadSample, Items
from sprint.data.shards import Entry, Skipped, is_whole, read_record, tar_path, write_shard
from sprint.data.source import SceneSource, open_items
from sprint.encoder import Encoder
from sprint.errors import SprintError
from sprint.files import sha256, write_whole
from sprint.log import BAR, QUIET_INTERVAL
from sprint.models.family import encode_null
from sprint.recipe import Data, DataKind, Recipe

AT_ONCE = 16  # samples in one forward of the family
AHEAD = 2  # such groups that are read while one is encoded
SHARD_SIZE = 1000  # samples
BAD_FILE = "bad.jsonl"  # in the cache's folder: what was skipped


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is, as torchrun says."""

    rank: int = 0
    processes: int = 1

    @classmethod
    def of_this_process(cls) -> "Place":
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    @property
    def device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def make_cache(
    recipe: Recipe,
    folder: Path,
    count: int | None = None,
    shard_size: int = SHARD_SIZE,
    dtype: str = "bf16",
) -> str:
    """Make the recipe's cache in `folder`, or what is missing of it.

    count   samples to take, from the first on; an endless source needs it, others are taken whole without
    dtype   of what is stored, "bf16" or "fp32"

    -> what to tell.  Raises SprintError for a folder that holds something else, for a source or a family that
    cannot be used, and for too many bad samples.
    """
    place = Place.of_this_process()
    items = _items(recipe.data, count)
    samples = min(count or len(items), len(items))
    encoder = Encoder(recipe, place.device)
    settings = Settings(
        family=encoder.name,
        weights=encoder.weights(),
        text=asdict(recipe.text),
        data=_what_decides(recipe.data),
        precision=recipe.precision.value,
        dtype=dtype,
        scaling_factor=float(encoder.family.autoencoder.config.scaling_factor),
        downscale=encoder.family.downscale,
        samples=samples,
        shard_size=shard_size,
        in_order=items.in_order,
    )
    with _claimed(folder, settings, place.rank):
        _make_shards(folder, settings, items, encoder, recipe.data, place)
        there = sum(is_whole(folder, number) for number in range(settings.shards))
        if there < settings.shards:
            return f"{folder}: {there} of {settings.shards} shards; the others are other processes' work"
        return _finish(folder, settings, encoder)


def verify_cache(folder: Path) -> str:
    """Read a finished cache back, this process's share of it.  -> what to tell.  Raises SprintError that names the
    first damaged file."""
    place = Place.of_this_process()
    files = verify(folder, place.rank, place.processes)
    count = sum(1 for _ in tqdm(files, desc="verify", unit=" files", file=sys.stderr, disable=None))
    return f"{folder}: {count} files as they were written"


# ---- what is cached ---------------------------------------------------------------------------------


class _Scenes(Items):
    """The first scenes of a series that has no end."""

    in_order = True

    def __init__(self, data: Data, count: int):
        self._source, self._count = SceneSource(data.seed), count

    def __len__(self) -> int:
        return self._count

    def item(self, index: int, draw: np.random.Generator) -> Sample:
        return self._source.samples(range(index, index + 1))[0]


def _items(data: Data, count: int | None) -> Items:
    if data.kind is DataKind.cache:
        raise SprintError("data.kind = cache: that is encoded already; name the kind of data to encode")
    if data.kind is not DataKind.scenes:
        return open_items(data)
    if count is None:
        raise SprintError("scenes never end; say how many to cache with --count, e.g. --count 10000")
    return _Scenes(data, count)


def _what_decides(data: Data) -> dict:
    """The settings of `data` that decide what is encoded, not how."""
    return {k: v for k, v in asdict(data).items() if k not in ("workers", "bad_share")} | {
        "kind": data.kind.value
    }


# ---- shards -----------------------------------------------------------------------------------------


def _make_shards(
    folder: Path, settings: Settings, items: Items, encoder: Encoder, data: Data, place: Place
) -> None:
    """This process's shards, as far as they are not there."""
    ours = {n: _indices(settings, n) for n in range(place.rank, settings.shards, place.processes)}
    missing = {number: indices for number, indices in ours.items() if not is_whole(folder, number)}
    total, to_do = (sum(map(len, shards.values())) for shards in (ours, missing))
    bad = BadSamples(data.bad_share, settings.samples, folder / BAD_FILE)
    with tqdm(
        desc="cache" if place.processes == 1 else f"cache, process 1 of {place.processes}",
        total=total,
        initial=total - to_do,
        unit=" samples",
        bar_format=BAR + ", {rate_fmt}",
        file=sys.stderr,
        disable=place.rank > 0,
        mininterval=0.2 if sys.stderr.isatty() else QUIET_INTERVAL,
    ) as bar:
        for number, indices in missing.items():
            entries = _entries(items, indices, encoder, data, bad, bar)
            write_shard(folder, number, indices.start, entries, DTYPES[settings.dtype])


def _indices(settings: Settings, number: int) -> range:
    first = number * settings.shard_size
    return range(first, min(first + settings.shard_size, settings.samples))


def _entries(
    items: Items, indices: range, encoder: Encoder, data: Data, bad: BadSamples, bar: tqdm
) -> Iterator[Entry | Skipped]:
    """Every sample of `indices`, encoded or skipped, in their order."""
    for group in _read_ahead(items, indices, data):
        whole = {index: item for index, item in group.items() if not isinstance(item, BadSample)}
        encoded = dict(zip(whole, encoder(list(whole.values())), strict=True)) if whole else {}
        for index, item in group.items():
            if index in encoded and not all(x.isfinite().all() for x in encoded[index]):
                item = BadSample(
                    "NaN latent", f"{data.path or data.kind.value}, sample {index}", "as encoded"
                )
            if isinstance(item, BadSample):
                bad.bad(item)
                yield Skipped(index, item.reason, item.where)
                continue
            bad.good()
            height, width = (side * encoder.family.downscale for side in encoded[index].latent.shape[1:])
            yield Entry(index, item.caption, height, width, encoded[index])
        bar.update(len(group))


def _read_ahead(items: Items, indices: range, data: Data) -> Iterator[dict[int, Item | BadSample]]:
    """Groups of samples by index, read by data.workers threads while earlier ones are encoded."""

    def read(index: int) -> Item | BadSample:
        try:
            return items.item(index, np.random.default_rng([data.seed, index]))
        except BadSample as bad:
            return bad

    waiting = deque()
    with ThreadPoolExecutor(data.workers, thread_name_prefix="read") as pool:
        for part in parts(len(indices), AT_ONCE):
            waiting.append({index: pool.submit(read, index) for index in indices[part]})
            if len(waiting) > AHEAD:
                yield {index: future.result() for index, future in waiting.popleft().items()}
        for group in waiting:
            yield {index: future.result() for index, future in group.items()}


# ---- the folder -------------------------------------------------------------------------------------


@contextmanager
def _claimed(folder: Path, settings: Settings, rank: int) -> Iterator[None]:
    """The folder holds these settings' cache and no other, and inside no other process of this rank works on it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".lock-{rank}", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SprintError(f"{folder}: another `sprint cache` is at work there; wait for it") from None
        there = next((folder / name for name in (CACHE, UNFINISHED) if (folder / name).exists()), None)
        if there is None:
            if stranger := next((f.name for f in sorted(folder.iterdir()) if f.name[0] != "."), None):
                raise SprintError(f"{folder}: holds {stranger} and no cache; give another folder with -o")
            write_whole(folder / UNFINISHED, json.dumps({"settings": asdict(settings)}, indent=1))
        elif differs := ", ".join(differences(asdict(settings), asdict(read_settings(there)[0]))):
            raise SprintError(
                f"{folder}: holds a cache of other settings: {differs}; give another folder with -o, or delete it"
            )
        yield


def _finish(folder: Path, settings: Settings, encoder: Encoder) -> str:
    """Write what stands beside the shards, cache.json last.  -> what to tell"""
    text, mask = (x.cpu().contiguous() for x in encode_null(encoder.family))
    null = safetensors.torch.save({"text": text.to(DTYPES[settings.dtype]), "mask": mask})
    write_whole(folder / NULL, null)
    records = [read_record(folder, number) for number in range(settings.shards)]
    count = sum(record.samples for record in records)
    skipped = Counter(sample.reason for record in records for sample in record.skipped)
    if not count:
        raise SprintError(
            f"{folder}: none of {settings.samples} samples could be used; see {folder / BAD_FILE}"
        )
    files = [{"name": NULL, "bytes": len(null), "sha256": sha256(folder / NULL)}]
    for number, record in enumerate(records):
        name = tar_path(folder, number).name
        files.append(
            {"name": name, "bytes": record.bytes, "sha256": record.sha256, "samples": record.samples}
        )
    libraries = ("sprint-distill", "torch", "diffusers", "transformers")
    content = {
        "made_by": {name: version(name) for name in libraries},
        "settings": asdict(settings),
        "samples": count,
        "skipped": dict(skipped.most_common()),
        "files": files,
    }
    write_whole(folder / CACHE, json.dumps(content, indent=1))
    (folder / UNFINISHED).unlink(missing_ok=True)
    size = sum(file["bytes"] for file in files) / 1e6
    reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.most_common())
    note = f"; skipped {sum(skipped.values())} ({reasons}), see {folder / BAD_FILE}" if skipped else ""
    return (
        f"{folder}: {count} samples in {len(records)} shards, {size:.1f} MB{note}\n"
        f"train from it with data.kind=cache data.path={folder}"
    )
