"""Every format that the loader reads, filled with made-up samples from a seed. Not a program."""

import importlib.util
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from sprint.base.files import write_whole
from sprint.data.batch import Encoded
from sprint.data.buckets import CELL
from sprint.data.cache.items import CACHE, Settings
from sprint.data.cache.shards import Entry, record_path, tar_path, write_shard
from sprint.data.encode.make import listed
from sprint.recipe.schema import Data, DataKind, Text

CHANNELS, TEXT_WIDTH = 32, 2304  # of Sana's autoencoder and text encoder
TOKENS = (80, 161)  # real ones in a caption, drawn evenly: 120 on average
QUALITY, NOISE = 90, 6.0  # of the JPEGs; levels of 255: 290 KB at 1024 px
SHARD = 64  # samples
SCENES = "scenes"


class Format(NamedTuple):
    """data: how a recipe names it; bytes: of one sample in its files (0: there are none)"""

    data: Data
    bytes: float


def jpegs(count: int, size: int) -> Iterator[bytes]:
    """Noise over colour gradients, `size` high and a quarter wider."""
    for k in range(count):
        draw = np.random.default_rng([0, k])
        corners = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = corners.resize((size * 5 // 4, size), Image.Resampling.BICUBIC)
        noise = NOISE * draw.standard_normal((size, size * 5 // 4, 3), np.float32)
        stream = io.BytesIO()
        Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
        yield stream.getvalue()


def caption(k: int) -> str:
    return f"picture number {k}, of coloured light in fog"


def encoded(count: int, size: int) -> Iterator[Encoded]:
    """Numbers of the shapes that Sana's family gives for pictures of `size`."""
    side = size // CELL
    for k in range(count):
        draw = np.random.default_rng([1, k])
        latent = draw.standard_normal((CHANNELS, side, side), np.float32)
        text = draw.standard_normal((draw.integers(*TOKENS), TEXT_WIDTH), np.float32)
        yield Encoded(torch.from_numpy(latent), torch.from_numpy(text))


def write_folder(folder: Path, pictures: Sequence[bytes], size: int) -> Data:
    for k, content in enumerate(pictures):
        write_whole(folder / f"{k:06d}.jpg", content)
        write_whole(folder / f"{k:06d}.txt", caption(k))
    return Data(kind=DataKind.folder, path=str(folder), size=size)


def write_webdataset(folder: Path, pictures: Sequence[bytes], size: int) -> Data:
    def members(k: int) -> dict[str, bytes]:
        return {"jpg": pictures[k], "json": json.dumps({"prompt": caption(k)}).encode()}

    write_tars(folder, len(pictures), members)
    return Data(kind=DataKind.webdataset, path=str(folder), size=size)


def write_huggingface(folder: Path, pictures: Sequence[bytes], size: int) -> Data:
    """Parquet, which the library turns into its own files when it is opened."""
    import datasets

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = folder.with_name("huggingface-cache")
    columns = {
        "image": [{"bytes": content, "path": None} for content in pictures],
        "text": [caption(k) for k in range(len(pictures))],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    folder.mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(folder / "train.parquet")
    return Data(kind=DataKind.huggingface, path=str(folder), size=size)


def write_cache(folder: Path, count: int, size: int) -> Data:
    """As `sprint cache` does, less the empty prompt, which no sample needs."""
    folder.mkdir()
    settings = Settings(
        family="made up",
        weights={},
        text=asdict(Text()),
        data={"kind": "folder", "size": size, "aspect_buckets": False},
        precision="bf16",
        dtype="bf16",
        scaling_factor=1.0,
        downscale=CELL,
        samples=count,
        shard_size=SHARD,
        in_order=False,
    )
    entries = (Entry(k, caption(k), size, size, x) for k, x in enumerate(encoded(count, size)))
    for number in range(settings.shards):
        indices = range(number * SHARD, min((number + 1) * SHARD, count))
        write_shard(folder, number, indices.start, (next(entries) for _ in indices), torch.bfloat16)
    content = {
        "settings": asdict(settings),
        "samples": count,
        "files": [listed(tar_path(folder, number)) for number in range(settings.shards)],
        "records": [listed(record_path(folder, number)) for number in range(settings.shards)],
    }
    write_whole(folder / CACHE, json.dumps(content))
    return Data(kind=DataKind.cache, path=str(folder), size=size)


def write_reference(folder: Path, count: int, size: int) -> Data:
    samples, length = encoded(count, size), Text().max_length

    def members(k: int) -> dict[str, bytes]:
        latent, text, _ = next(samples)
        padded = np.zeros((1, length, TEXT_WIDTH), np.float16)
        padded[0, : len(text)] = text
        mask = (np.arange(length) < len(text)).astype(np.int16)[None]
        npy, npz = io.BytesIO(), io.BytesIO()
        np.save(npy, latent.numpy().astype(np.float16))
        np.savez_compressed(npz, caption_feature=padded, attention_mask=mask)
        about = {"height": size, "width": size, "prompt": caption(k)}
        return {"json": json.dumps(about).encode(), "npy": npy.getvalue(), "npz": npz.getvalue()}

    write_tars(folder, count, members)
    return Data(kind=DataKind.cache, path=str(folder), size=size)


def write_tars(folder: Path, count: int, members: Callable[[int], dict[str, bytes]]) -> None:
    """members   of sample k, by suffix; asked for in order"""
    folder.mkdir()
    for first in range(0, count, SHARD):
        with tarfile.open(folder / f"{first // SHARD:06d}.tar", "w") as tar:
            for k in range(first, min(first + SHARD, count)):
                for suffix, content in members(k).items():
                    entry = tarfile.TarInfo(f"{k:06d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


def make_formats(folder: Path, count: int, size: int) -> dict[str, Format]:
    """Every format with `count` samples, in `folder`. Without the `datasets` library, huggingface is left out."""
    pictures = list(jpegs(count, size))
    writers = {
        "folder": partial(write_folder, pictures=pictures),
        "webdataset": partial(write_webdataset, pictures=pictures),
        "huggingface": partial(write_huggingface, pictures=pictures),
        "cache": partial(write_cache, count=count),
        "reference": partial(write_reference, count=count),
    }
    if importlib.util.find_spec("datasets") is None:
        del writers["huggingface"]
    formats = {}
    for name, write in writers.items():
        data = write(folder / name, size=size)
        files = (file for file in (folder / name).rglob("*") if file.is_file())
        formats[name] = Format(data, sum(file.stat().st_size for file in files) / count)
    return formats | {SCENES: Format(Data(size=64), 0.0)}
