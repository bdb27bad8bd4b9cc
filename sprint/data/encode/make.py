"""`sprint cache`: every sample of a recipe through the frozen family once, into shards that training reads.

Process r of W makes shards r, r + W, … and needs no word from the others: whoever finds the last one in place
writes cache.json. What is whole by its size is kept, so the same command goes on where it stopped; hashes are
compared by --verify alone, which reads everything.

Of several captions of a picture one is drawn here, once for all epochs. A skipped sample is not there to be
replaced: training from a cache that skipped some meets the others in another order than online training does.
"""

import json
import logging
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import safetensors.torch
from tqdm import tqdm

from sprint.base.dtypes import DTYPES
from sprint.base.errors import SprintError
from sprint.base.files import sha256, sweep, write_whole
from sprint.base.locks import lock, locked
from sprint.base.place import Place
from sprint.base.progress import BAR, QUIET_INTERVAL
from sprint.data.bad import BadSamples
from sprint.data.batch import Item, Sample, flat, parts
from sprint.data.cache.items import (
    CACHE,
    NULL,
    UNFINISHED,
    Settings,
    differences,
    read_settings,
    verify,
)
from sprint.data.cache.shards import (
    Entry,
    Record,
    Skipped,
    folder_lock,
    is_whole,
    read_record,
    record_path,
    tar_path,
    write_shard,
)
from sprint.data.encode.encoder import Encoder
from sprint.data.items import BadSample, Items, PromptedItems
from sprint.data.source import SceneSource, open_items
from sprint.maths.schedule import teacher_times
from sprint.models.encoders import encode_null
from sprint.recipe.schema import Data, DataKind, Recipe
from sprint.recipe.settings import each_setting, kinds

log = logging.getLogger(__name__)
AT_ONCE = 16  # samples in one forward of the family
AHEAD = 2  # such groups that are read while one is encoded
SHARD_SIZE = 1000  # samples
BAD_FILE = "bad.jsonl"  # in the cache's folder: what was skipped
# Of the recipe's data what counts for every kind; what counts for some says `kinds` of its field.
ALWAYS = ("path", "size", "aspect_buckets", "seed")
DRAWN = ("teacher_steps", "guidance_scale")


def make_cache(
    recipe: Recipe,
    folder: Path,
    count: int | None = None,
    shard_size: int = SHARD_SIZE,
    dtype: str = "bf16",
    trajectories: bool = False,
) -> str:
    """Make the recipe's cache in `folder`, or what is missing of it.

    count   samples to take, from the first on; an endless source needs it, others are taken whole without
    dtype   of what is stored, "bf16" or "fp32"
    trajectories   of the captions alone, the whole ways of the teacher to what they say, and no pictures

    -> what to tell.  Raises SprintError for a folder that holds something else, for a source or a family that
    cannot be used, and for more bad samples than data.bad_share of all. What an earlier run skipped counts, mended
    meanwhile or not.
    """
    if folder.exists() and not folder.is_dir():
        raise SprintError(f"{folder}: a file; name a folder with -o")
    place = Place.of_this_process()
    items = _items(recipe.data, count)
    if trajectories and recipe.data.aspect_buckets:
        raise SprintError("data.aspect_buckets = true, but trajectories lead to square pictures")
    items = PromptedItems(items) if trajectories else items
    samples = min(count or len(items), len(items))
    encoder = Encoder(recipe, place.device, trajectories)
    settings = Settings(
        family=encoder.name,
        weights=encoder.weights(),
        text=asdict(recipe.text),
        data=_what_decides(recipe.data, trajectories),
        precision=recipe.precision.value,
        dtype=dtype,
        scaling_factor=float(encoder.family.autoencoder.config.scaling_factor),
        downscale=encoder.family.downscale,
        samples=samples,
        shard_size=shard_size,
        in_order=items.in_order,
        times=teacher_times(recipe.distill.trajectories.steps) if trajectories else [],
        guidance=list(recipe.distill.guidance_scales) if trajectories else [],
    )
    if not _begun(folder):
        _try_one(items, min(samples, AT_ONCE), encoder, recipe.data)
    with _claimed(folder, settings, place.rank):
        kept = _make_shards(folder, settings, items, encoder, recipe.data, place)
        note = f"; kept {kept} shards by size; --verify compares hashes" if kept else ""
        there = sum(is_whole(folder, number) for number in range(settings.shards))
        if there < settings.shards:
            return (
                f"{folder}: {there} of {settings.shards} shards; the others are other processes' work{note}"
            )
        return _finish(folder, settings, encoder, recipe.data.bad_share, note)


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

    def caption(self, index: int, draw: np.random.Generator) -> str:
        return self._source.prompted().samples(range(index, index + 1))[0].caption


def _items(data: Data, count: int | None) -> Items:
    if data.kind is DataKind.cache:
        raise SprintError("data.kind = cache: that is encoded already; name the kind of data to encode")
    if data.aspect_buckets and data.kind in (DataKind.scenes, DataKind.prompts):
        raise SprintError(f"data.aspect_buckets = true, but {data.kind.value} have no aspect to keep")
    if data.kind is not DataKind.scenes:
        return open_items(data)
    if count is None:
        raise SprintError("scenes never end; say how many to cache with --count, e.g. --count 10000")
    return _Scenes(data, count)


def _what_decides(data: Data, trajectories: bool = False) -> dict:
    """The settings of `data` that decide what is encoded, not how; a path in full, a name on the hub as it is.

    Of trajectories their times and scales say what `DRAWN` says of pictures that the teacher draws.
    """
    own = [key for key, field, _ in each_setting(data) if data.kind.value in kinds(field)]
    own = [key for key in own if not (trajectories and key in DRAWN)]
    decides = {key: getattr(data, key) for key in (*ALWAYS, *own)}
    local = data.kind is not DataKind.huggingface or Path(data.path).exists()
    if data.kind is DataKind.scenes:
        decides["path"] = ""
    elif local:
        decides["path"] = str(Path(data.path).resolve())
    return decides | {"kind": data.kind.value}


def _try_one(items: Items, count: int, encoder: Encoder, data: Data) -> None:
    """Encode the first of `count` samples that can be read: what is wrong with the recipe shows before a folder is
    made. Raises SprintError."""
    for index in range(count):
        item = _read(items, index, data)
        if not isinstance(item, BadSample):
            encoder([item])
            return


# ---- shards -----------------------------------------------------------------------------------------


def _make_shards(
    folder: Path, settings: Settings, items: Items, encoder: Encoder, data: Data, place: Place
) -> int:
    """This process's shards, as far as they are not there.  -> how many were"""
    ours = {n: _indices(settings, n) for n in range(place.rank, settings.shards, place.processes)}
    missing = {number: indices for number, indices in ours.items() if not is_whole(folder, number)}
    total, to_do = (sum(map(len, shards.values())) for shards in (ours, missing))
    bad = BadSamples(data.bad_share, settings.samples, folder / BAD_FILE)
    _count_again(bad, [read_record(folder, number) for number in ours.keys() - missing.keys()])
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
    return len(ours) - len(missing)


def _count_again(bad: BadSamples, records: list[Record]) -> None:
    """What earlier runs met counts as if this one had met it. The good ones first: alone the bad are too many."""
    for _ in range(sum(record.samples for record in records)):
        bad.good()
    skipped = [sample for record in records for sample in record.skipped]
    if skipped:
        log.warning("%d samples stay skipped; to try them again, delete the cache", len(skipped))
    for sample in skipped:
        bad.bad(BadSample(sample.reason, sample.where))


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
            if index in encoded and not all(x.isfinite().all() for x in flat(encoded[index]).values()):
                item = BadSample("NaN latent", items.where(index), "as encoded")
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
    waiting = deque()
    with ThreadPoolExecutor(data.workers, thread_name_prefix="read") as pool:
        for part in parts(len(indices), AT_ONCE):
            waiting.append({index: pool.submit(_read, items, index, data) for index in indices[part]})
            if len(waiting) > AHEAD:
                yield {index: future.result() for index, future in waiting.popleft().items()}
        for group in waiting:
            yield {index: future.result() for index, future in group.items()}


def _read(items: Items, index: int, data: Data) -> Item | BadSample:
    try:
        return items.item(index, np.random.default_rng([data.seed, index]))
    except BadSample as bad:
        return bad


# ---- the folder -------------------------------------------------------------------------------------


@contextmanager
def _claimed(folder: Path, settings: Settings, rank: int) -> Iterator[None]:
    """The folder holds these settings' cache and no other, and inside no other process of this rank works on it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _lock_name(rank), "a") as own:
        with locked(folder_lock(folder)):  # so that of processes that start at once one begins the cache
            if not lock(own, wait=False):
                raise SprintError(f"{folder}: another `sprint cache` is at work there; wait for it")
            _take(folder, settings, rank)
            sweep(folder)
        yield


def _lock_name(rank: int | str) -> str:
    return f".lock-{rank}"


def _begun(folder: Path) -> Path | None:
    """What says which cache the folder holds, whole or not."""
    return next((folder / name for name in (CACHE, UNFINISHED) if (folder / name).exists()), None)


def _take(folder: Path, settings: Settings, rank: int) -> None:
    """Begin the cache, unless these settings' is there. Raises SprintError for a folder that holds anything else,
    but a cache that was begun and has no shard yet may be replaced, unless a process is at work on it."""
    there = _begun(folder)
    if there is None:
        if stranger := next((f.name for f in sorted(folder.iterdir()) if f.name[0] != "."), None):
            raise SprintError(f"{folder}: holds {stranger} and no cache; give another folder with -o")
    else:
        differs = ", ".join(differences(asdict(settings), vars(read_settings(there)[0])))
        if not differs:
            return
        started = there.name == CACHE or any(folder.glob("[0-9]*.tar"))
        if started or _others_work(folder, rank):
            raise SprintError(
                f"{folder}: holds a cache of other settings: {differs}; give another folder with -o, or delete it"
            )
    write_whole(folder / UNFINISHED, json.dumps({"settings": asdict(settings)}, indent=1))


def _others_work(folder: Path, rank: int) -> bool:
    for path in folder.glob(_lock_name("*")):
        if path.name != _lock_name(rank):
            with open(path, "a") as file:
                if not lock(file, wait=False):
                    return True
    return False


def _finish(folder: Path, settings: Settings, encoder: Encoder, bad_share: float, note: str) -> str:
    """Write what stands beside the shards, cache.json last.  -> what to tell, with `note` in it

    Raises SprintError where more than `bad_share` of the samples were skipped, by all processes and runs.
    """
    records = [read_record(folder, number) for number in range(settings.shards)]
    skipped = Counter(sample.reason for record in records for sample in record.skipped)
    reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.most_common())
    if skipped.total() > bad_share * settings.samples:
        raise SprintError(
            f"{folder}: {skipped.total()} of {settings.samples} samples are bad ({reasons}), more than "
            f"data.bad_share = {bad_share} allows; see {folder / BAD_FILE}; mend them, delete the folder and run "
            "this again, or allow more"
        )
    count = sum(record.samples for record in records)
    if not count:
        raise SprintError(
            f"{folder}: none of {settings.samples} samples could be used; see {folder / BAD_FILE}"
        )
    text, mask = (x.cpu().contiguous() for x in encode_null(encoder.family))
    null = safetensors.torch.save({"text": text.to(DTYPES[settings.dtype]), "mask": mask})
    write_whole(folder / NULL, null)
    files = [listed(folder / NULL)]
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
        "records": [listed(record_path(folder, number)) for number in range(settings.shards)],
    }
    write_whole(folder / CACHE, json.dumps(content, indent=1))
    (folder / UNFINISHED).unlink(missing_ok=True)
    size = sum(file["bytes"] for file in files) / 1e6
    if skipped:
        note = f"; skipped {skipped.total()} ({reasons}), see {folder / BAD_FILE}{note}"
    return (
        f"{folder}: {count} samples in {len(records)} shards, {size:.1f} MB{note}\n"
        f"train from it with data.kind=cache data.path={folder}{_how_to_learn(settings)}"
    )


def _how_to_learn(settings: Settings) -> str:
    """What a recipe must say beside the path to learn from trajectories, and not from their ends alone."""
    if not settings.times:
        return ""
    steps, scales = len(settings.times) - 1, ",".join(f"{scale:g}" for scale in settings.guidance)
    path = f"distill.trajectories.steps={steps} distill.trajectories.states=K"
    return f' {path} "distill.guidance_scales=[{scales}]", K up to {steps}'


def listed(file: Path) -> dict:
    """As cache.json lists it."""
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}
