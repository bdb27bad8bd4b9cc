"""Does the loader keep up? Samples per second of every data format, by number of workers, beside what a step needs.

    python tools/bench_data.py                        # 1024 px, 1, 2, 4 and 8 workers: about five minutes
    python tools/bench_data.py --quick                # one minute, rough; writes no file
    python tools/bench_data.py --need 15              # your GPU process takes 15 samples a second
    TMPDIR=/data python tools/bench_data.py           # makes its data there, some 3 MB a sample

Data is made up from a seed and then read as training reads it: `data.workers` threads read and decode whole batches
ahead, and the loop's own thread makes a `Batch` of what is encoded already.

    folder, webdataset, huggingface   JPEGs of --size pixels and a quarter wider, so that they are cropped; parquet
    cache                             what `sprint cache` writes: bf16 latents and about 120 tokens of 2304
    reference                         Sana's own layout: fp16 .npy, and .npz (compressed) of 300 padded tokens
    scenes                            the built-in ones, drawn at 64 px, not read
    no lock                           no data: SHA-256, which needs no lock of Python. What it gains from a second
                                      thread is what this machine has to give at that moment.

The need is that of one process. Scenes: the tiny network's step, measured here. All others: Sana 0.6B at 1024 px on
one H100, not measured but assumed: FLOPs counted by tools/bench_flops.py, done at 40% of its 989 TFLOP/s in bf16;
--need replaces it. GPUs that share a machine each need as much. Pictures must also pass the text encoder and the
autoencoder, which is the step's work and not in these figures; caches need neither.

Times are medians of interleaved rounds, with files in the page cache: compare MB/s with your disk. CPU milliseconds
are those of all threads; times the need they are the cores that loading takes, however busy the machine is.
Writes tools/results/data.json.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import math
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from bench_step import time_phases, update_of
from measure import RESULTS, ROOT, Request, interleaved, ratio, summary, write_results
from PIL import Image

from sprint.cpu import keep_freed_memory
from sprint.data.batch import Encoded
from sprint.data.buckets import CELL
from sprint.data.cache import CACHE, Settings
from sprint.data.shards import Entry, tar_path, write_shard
from sprint.data.source import batch_positions, collate, open_source, prefetch
from sprint.errors import SprintError
from sprint.files import write_whole
from sprint.recipe import Data, DataKind, Precision, Text, load_recipe

CHANNELS, TEXT_WIDTH = 32, 2304  # of Sana's autoencoder and text encoder
TOKENS = (80, 161)  # real ones in a caption, drawn evenly: 120 on average
QUALITY, NOISE = 90, 6.0  # of the JPEGs; levels of 255: 280 KB at 1024 px
SHARD = 64  # samples
HASHED = bytes(2**22)  # what stands for a sample where no lock is needed
CONTROL, SCENES = "no lock", "scenes"
H100_FLOPS, ASSUMED_SHARE = 989e12, 0.4  # dense bf16, and how much of it a step gets


# ---- made-up data -----------------------------------------------------------------------------------


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
    files = []
    for number in range(settings.shards):
        indices = range(number * SHARD, min((number + 1) * SHARD, count))
        record = write_shard(folder, number, indices.start, (next(entries) for _ in indices), torch.bfloat16)
        name = tar_path(folder, number).name
        files.append({"name": name, "bytes": record.bytes, "sha256": record.sha256})
    content = {"settings": asdict(settings), "samples": count, "files": files}
    write_whole(folder / CACHE, json.dumps(content))
    return Data(kind=DataKind.cache, path=str(folder), size=size)


def write_reference(folder: Path, count: int, size: int) -> Data:
    samples, length = encoded(count, size), Text().max_length

    def members(k: int) -> dict[str, bytes]:
        latent, text = next(samples)
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
    """Every format with `count` samples, in `folder`. Without `datasets` its format is not there."""
    pictures = list(jpegs(count, size))
    writers = {
        "folder": partial(write_folder, pictures=pictures),
        "webdataset": partial(write_webdataset, pictures=pictures),
        "huggingface": partial(write_huggingface, pictures=pictures),
        "cache": partial(write_cache, count=count),
        "reference": partial(write_reference, count=count),
    }
    if importlib.util.find_spec("datasets") is None:
        print("huggingface: skipped; pip install 'sprint-distill[data]'", file=sys.stderr)
        del writers["huggingface"]
    formats = {}
    for name, write in writers.items():
        data = write(folder / name, size=size)
        files = (file for file in (folder / name).rglob("*") if file.is_file())
        formats[name] = Format(data, sum(file.stat().st_size for file in files) / count)
    return formats | {SCENES: Format(Data(size=64), 0.0)}


# ---- reading ----------------------------------------------------------------------------------------


class Readable(Protocol):
    def samples(self, positions: range) -> list: ...


class Hashes:
    """In the place of a source: work of which two threads take half the time, on two idle cores."""

    def samples(self, positions: range) -> list[bytes]:
        return [hashlib.sha256(HASHED).digest() for _ in positions]


def batches_of(source: Readable, samples: int, batch: int, workers: int) -> Iterator[object]:
    """The first `samples` in whole batches as the loop has them: pictures as they are, encoded ones as a `Batch`."""

    def read(step: int) -> list:
        return source.samples(batch_positions(step, batch))

    with closing(prefetch(read, 0, samples // batch, workers)) as ahead:
        for items in ahead:
            whole = isinstance(items[0], Encoded)
            yield collate(items, "cpu", max_length=Text().max_length) if whole else items


@dataclass
class Pass:
    """One reading of `samples`; `cpu` collects seconds of all threads, call by call."""

    source: Readable
    samples: int
    batch: int
    workers: int
    cpu: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        began = time.process_time()
        for _ in batches_of(self.source, self.samples, self.batch, self.workers):
            pass
        self.cpu.append(time.process_time() - began)


def samples_for(source: Readable, count: int, batch: int, seconds: float) -> int:
    """How many make a round of at least so many seconds with one worker: `count` or a multiple of it."""
    read_once = Pass(source, count, batch, 1)
    read_once()  # imports, open files
    began = time.perf_counter()
    read_once()
    return count * max(1, math.ceil(seconds / (time.perf_counter() - began)))


def measure(formats: dict[str, Format], args: argparse.Namespace) -> dict[str, dict]:
    """Rates of every format by number of workers. Raises SprintError if a sample was passed over as bad."""
    sources = {name: open_source(format.data) for name, format in formats.items()} | {CONTROL: Hashes()}
    samples = {name: samples_for(s, args.samples, args.batch, args.seconds) for name, s in sources.items()}
    passes = {
        (name, workers): Pass(source, samples[name], args.batch, workers)
        for name, source in sources.items()
        for workers in args.workers
    }
    seconds = interleaved(passes, args.rounds)
    for name in formats:
        if skipped := sources[name].skipped:
            raise SprintError(f"{name}: samples were passed over ({skipped}); its figures mean nothing")
    results = {}
    for name in sources:
        size = formats[name].bytes if name in formats else 0.0
        rows = {}
        for workers in args.workers:
            cpu = passes[name, workers].cpu[-args.rounds :]
            rates = summary([samples[name] / wall for wall in seconds[name, workers]])
            rows[str(workers)] = {
                "samples_per_second": rates,
                "cpu_ms_per_sample": summary([1000 * each / samples[name] for each in cpu]),
                "mb_per_second": rates["median"] * size / 1e6,
            }
        results[name] = {"bytes_per_sample": size, "samples_per_round": samples[name], "workers": rows}
        if {1, 2} <= set(args.workers):
            results[name]["speed_of_two_workers_over_one"] = ratio(seconds[name, 1], seconds[name, 2])
    return results


# ---- the need ---------------------------------------------------------------------------------------


class Need(NamedTuple):
    """What one process of the step takes, and where the figure comes from."""

    samples_per_second: float
    how: str


class Verdict(NamedTuple):
    """workers: the fewest that keep up, or None; factor: their rate over the need, or the best there is, below 1"""

    workers: int | None
    factor: float


def verdict(rates: dict[int, float], need: float) -> Verdict:
    for workers in sorted(rates):
        if rates[workers] >= need:
            return Verdict(workers, rates[workers] / need)
    return Verdict(None, max(rates.values()) / need)


def need_of_scenes(rounds: int) -> Need:
    """Of stage 2 of recipes/tiny.yaml: its batch, its network's shapes with random weights, G and D in turn."""
    batch = load_recipe(ROOT / "recipes" / "tiny.yaml").distill.batch_size
    update = update_of("ours", Request("tiny", batch, "cpu", Precision.fp32), checkpointing=False)
    pairs = time_phases({"ours": update}, rounds)["ours"]["G+D"]
    return Need(2 * batch / summary(pairs)["median"], "measured: stage 2 of the tiny recipe on this machine")


def need_by_flops(file: Path) -> Need:
    """A pair of updates takes two batches. Raises SprintError where the counts cannot be read."""
    try:
        counts = json.loads(file.read_text())
        flops = counts["G"]["all"]["flops"] + counts["D"]["all"]["flops"]
        rate = 2 * counts["batch"] * H100_FLOPS * ASSUMED_SHARE / flops
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SprintError(f"{file}: no counted FLOPs there ({error}); say --need") from error
    how = f"assumed, not measured: counted FLOPs of 0.6B at {ASSUMED_SHARE:.0%} of an H100's 989 TFLOP/s"
    return Need(rate, how)


def judge(results: dict[str, dict], needs: dict[str, Need]) -> None:
    """Add need and verdict to every format."""
    for name, need in needs.items():
        rows = results[name]["workers"]
        rates = {int(workers): row["samples_per_second"]["median"] for workers, row in rows.items()}
        cpu = min(row["cpu_ms_per_sample"]["median"] for row in rows.values()) / 1000
        results[name]["need"] = need._asdict()
        results[name]["verdict"] = verdict(rates, need.samples_per_second)._asdict()
        results[name]["cores_at_need"] = cpu * need.samples_per_second


# ---- the page ---------------------------------------------------------------------------------------


def spread(values: dict[str, float], digits: int = 2) -> str:
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f}-{values['max']:.{digits}f})"


def said(verdict: dict) -> str:
    if verdict["workers"] is None:
        return f"**does not keep up**: {verdict['factor']:.2f} of the need at best"
    return f"keeps up with {verdict['workers']}: {verdict['factor']:.1f} times the need"


def page(results: dict) -> str:
    formats, before, after = results["formats"], *results["load_average"]
    lines = [
        f"{results['size']} px, {results['samples']} samples in batches of {results['batch']}, {results['cores']} "
        f"cores, load {before:.1f} before and {after:.1f} after; medians of {results['rounds']} rounds and their spread",
        "",
        "| format | KB a sample | workers | samples/s | CPU ms a sample | MB/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in formats.items():
        for workers, row in found["workers"].items():
            cpu = row["cpu_ms_per_sample"]["median"]
            lines.append(
                f"| {name} | {found['bytes_per_sample'] / 1000:.0f} | {workers} | "
                f"{spread(row['samples_per_second'], 0)} | {cpu:.2f} | {row['mb_per_second']:.0f} |"
            )
    lines += [
        "",
        "| format | need, samples/s | with how many workers | cores that it takes | 2 workers over 1 |",
        "|---|---|---|---|---|",
    ]
    for name, found in formats.items():
        gain = found.get("speed_of_two_workers_over_one")
        speed = spread(gain) if gain else ""
        if name == CONTROL:
            lines.append(f"| {name} | | | | {speed} |")
            continue
        need, cores = found["need"]["samples_per_second"], found["cores_at_need"]
        lines.append(f"| {name} | {need:.1f} | {said(found['verdict'])} | {cores:.2f} | {speed} |")
    sources: dict[str, list[str]] = {}
    for name in formats.keys() - {CONTROL}:
        sources.setdefault(formats[name]["need"]["how"], []).append(name)
    lines += ["", *(f"need of {', '.join(sorted(names))}: {how}" for how, names in sources.items())]
    lines.append(
        "Pictures must also be encoded (text encoder, autoencoder): the step's work, not the loader's."
    )
    return "\n".join(lines)


# ---- the command ------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> None:
    """Raises SprintError for what cannot be measured."""
    if args.size < CELL or args.size % CELL:
        raise SprintError(f"--size {args.size}: it must be a multiple of {CELL}")
    least = min(args.workers + [args.batch, args.rounds])
    if least < 1:
        raise SprintError(f"{least}: workers, --batch and --rounds must be at least 1")
    if args.samples < args.batch or args.samples % args.batch:
        raise SprintError(f"--samples {args.samples}: it must be a multiple of --batch {args.batch}")
    if args.need is not None and args.need <= 0:
        raise SprintError(f"--need {args.need}: it must be more than 0 samples a second")
    if args.need is None and args.size != 1024:
        raise SprintError(
            f"--size {args.size}: FLOPs were counted at 1024 px; say with --need what a step takes"
        )


def run(args: argparse.Namespace, folder: Path) -> dict:
    need = Need(args.need, "given") if args.need else need_by_flops(RESULTS / "bench_flops_0.6b_cpu.json")
    keep_freed_memory()  # as a run does
    before = os.getloadavg()[0]
    formats = make_formats(folder, args.samples, args.size)
    found = measure(formats, args)
    judge(found, dict.fromkeys(formats, need) | {SCENES: need_of_scenes(args.rounds)})
    return {
        "size": args.size,
        "samples": args.samples,
        "batch": args.batch,
        "rounds": args.rounds,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [before, os.getloadavg()[0]],
        "formats": found,
    }


def parse(argv: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024, help="pixels, a multiple of 32 (default 1024)")
    parser.add_argument("--samples", type=int, default=128, help="to make of each format (default 128)")
    parser.add_argument(
        "--batch", type=int, default=8, help="samples that a worker reads at once (default 8)"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2, 4, 8], help="data.workers to try (default 1 2 4 8)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round, at least (default 1)")
    parser.add_argument("--need", type=float, help="samples a second that one process of the step takes")
    parser.add_argument("--quick", action="store_true", help="32 samples, 1 and 2 workers, 3 short rounds")
    args = parser.parse_args(argv)
    if args.quick:
        args.samples, args.workers, args.rounds, args.seconds = 32, [1, 2], 3, 0.2
    return args


def main(argv: Iterable[str] | None = None) -> int:
    args = parse(argv)
    try:
        check(args)
        with tempfile.TemporaryDirectory(prefix="sprint-bench-data-") as folder:
            results = run(args, Path(folder))
    except (SprintError, OSError) as error:
        print(f"bench_data: {error}", file=sys.stderr)
        return 2
    print(page(results))
    if not args.quick:
        print(write_results("data", results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
