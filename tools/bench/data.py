"""Does the loader keep up? Samples per second of every data format, by number of workers, beside what a step needs.

    python -m tools.bench.data                        # 1024 px; 1, 2, 4 and 8 workers: five minutes or more
    python -m tools.bench.data --quick                # a minute or two, rough; writes no file
    python -m tools.bench.data --need 15              # your GPU process takes 15 samples a second
    TMPDIR=/data python -m tools.bench.data           # makes its data there, some 3 MB a sample

Data is made up from a seed and then read as training reads it: `data.workers` threads read and decode whole batches
ahead, and the loop's own thread makes a `Batch` of what is encoded already.

    folder, webdataset, huggingface   JPEGs of --size pixels and a quarter wider, so that they are cropped
    cache                             what `sprint cache` writes: bf16 latents and about 120 tokens of 2304
    reference                         Sana's own layout: fp16 .npy, and .npz (compressed) of 300 padded tokens
    scenes                            the built-in ones: drawn at 64 px, not read
    no lock                           no data but SHA-256, which needs no lock of Python: what a second thread gains
                                      at best

The need is that of one process; those that share a machine each need as much. Of scenes it is the tiny network's step,
measured here. Of all others it is Sana 0.6B at 1024 px on an H100, which is assumed, not measured: the FLOPs that
tools/bench/flops.py counted, done at 40% of 989 TFLOP/s; --need replaces it. Pictures must also pass the text
encoder and the autoencoder: that is the step's work and in none of these figures. Caches need neither.

Rates are medians of interleaved rounds, with files in the page cache: compare MB/s with your disk. Where threads are
more than free cores, they wait for one; Linux says how long, and "a core each" is the rate less that wait: computed,
not measured, as good as what it makes of "no lock", and too low for more workers than there are cores (where Linux is
silent, it is the rate itself). CPU milliseconds are those of all threads: times the need, they are the cores that
loading takes. Larger pictures take longer: --size is what they are stored at and what training sees. Writes
tools/results/data.json.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from sprint.base.cpu import keep_freed_memory
from sprint.base.errors import SprintError
from sprint.data.batch import Encoded
from sprint.data.batching import batch_positions, collate, prefetch
from sprint.data.buckets import CELL
from sprint.data.source import open_source
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import Precision, Text
from tools.bench.data_cases import SCENES, Format, make_formats
from tools.bench.measure import (
    RESULTS,
    ROOT,
    Request,
    interleaved,
    ratio,
    summary,
    write_results,
)
from tools.bench.step import time_phases, update_of
from tools.bench.variants import OURS

CONTROL, HASHED = "no lock", bytes(2**22)  # hashed in the place of a sample
QUEUE = Path("/proc/thread-self/schedstat")  # ns on a core, ns waiting for one, turns
H100_FLOPS, ASSUMED_SHARE = 989e12, 0.4  # dense bf16, and how much of it a step gets
COUNTED = "bench_flops_0.6b_cpu.json"


# ---- reading ----------------------------------------------------------------------------------------


class Readable(Protocol):
    def samples(self, positions: range) -> list: ...


class Hashes:
    """In the place of a source: work that two threads on two cores do in half the time."""

    def samples(self, positions: range) -> list[bytes]:
        return [hashlib.sha256(HASHED).digest() for _ in positions]


@dataclass
class Pass:
    """One reading of `samples` in whole batches; the lists grow by one entry a call.

    cpu      seconds of all threads
    queued   seconds that the reading threads waited for a core, on average
    """

    source: Readable
    samples: int
    batch: int
    workers: int
    cpu: list[float] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        began, waits = time.process_time(), []
        for _ in self.batches(waits):
            pass
        self.cpu.append(time.process_time() - began)
        self.queued.append(sum(waits) / self.workers)

    def batches(self, waits: list[float]) -> Iterator[object]:
        """As the loop has them: pictures as they are, what is encoded as a `Batch`."""

        def read(step: int) -> list:
            began = waited_for_a_core()
            items = self.source.samples(batch_positions(step, self.batch))
            waits.append(waited_for_a_core() - began)
            return items

        with closing(prefetch(read, 0, self.samples // self.batch, self.workers)) as ahead:
            for items in ahead:
                if isinstance(items[0], Encoded):
                    yield collate(items, "cpu", max_length=Text().max_length)
                else:
                    yield items


def waited_for_a_core() -> float:
    """Seconds, of the calling thread since it started; 0 where the system does not say."""
    try:
        return int(QUEUE.read_bytes().split()[1]) / 1e9
    except OSError:
        return 0.0


def samples_for(source: Readable, count: int, batch: int, seconds: float) -> int:
    """How many make a round of at least so many seconds with one worker: `count` or a multiple of it."""
    read_once = Pass(source, count, batch, 1)
    read_once()  # opens files
    began = time.perf_counter()
    read_once()
    return count * max(1, math.ceil(seconds / (time.perf_counter() - began)))


# ---- measuring --------------------------------------------------------------------------------------


def measure(formats: dict[str, Format], args: argparse.Namespace) -> dict[str, dict]:
    """Rates of every format by number of workers. Raises SprintError if a sample was passed over as bad."""
    sources = {name: open_source(each.data) for name, each in formats.items()} | {CONTROL: Hashes()}
    samples = {name: samples_for(s, args.samples, args.batch, args.seconds) for name, s in sources.items()}
    passes = {
        (name, workers): Pass(source, samples[name], args.batch, workers)
        for name, source in sources.items()
        for workers in args.workers
    }
    seconds = interleaved(passes, args.rounds)
    for name in formats:
        if skipped := sources[name].skipped:
            raise SprintError(f"{name}: samples were passed over ({skipped}), so its figures mean nothing")
    return {
        name: {
            "bytes_per_sample": formats[name].bytes if name in formats else 0.0,
            "samples_per_round": samples[name],
        }
        | rates_of({workers: (seconds[name, workers], passes[name, workers]) for workers in args.workers})
        for name in sources
    }


def rates_of(found: dict[int, tuple[list[float], Pass]]) -> dict:
    """By number of workers, of the seconds of every round and the pass that they measure."""
    rows, walls, free = {}, {}, {}
    for workers, (seconds, each) in found.items():
        rounds = len(seconds)  # the pass knows the warm-up too
        walls[workers] = seconds
        free[workers] = [wall - wait for wall, wait in zip(seconds, each.queued[-rounds:], strict=True)]
        rows[str(workers)] = {
            "samples_per_second": summary([each.samples / wall for wall in walls[workers]]),
            "core_each": summary([each.samples / wall for wall in free[workers]]),
            "cpu_ms_per_sample": summary([1000 * cpu / each.samples for cpu in each.cpu[-rounds:]]),
        }
    both = {1, 2} <= found.keys()
    gains = {"measured": ratio(walls[1], walls[2]), "core_each": ratio(free[1], free[2])} if both else {}
    return {"workers": rows, "two_workers_over_one": gains}


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
    """rates   samples per second by number of workers"""
    for workers in sorted(rates):
        if rates[workers] >= need:
            return Verdict(workers, rates[workers] / need)
    return Verdict(None, max(rates.values()) / need)


def need_of_scenes(rounds: int) -> Need:
    """Of stage 2 of recipes/tiny.yaml: its batch, its network's shapes with random weights, G and D in turn."""
    batch = load_recipe(ROOT / "recipes" / "tiny.yaml").distill.batch_size
    update = update_of(OURS, Request("tiny", batch, "cpu", Precision.fp32), checkpointing=False)
    pairs = time_phases({"ours": update}, rounds)["ours"]["G+D"]
    return Need(2 * batch / statistics.median(pairs), "measured: stage 2 of the tiny network on this machine")


def need_by_flops(file: Path) -> Need:
    """A pair of updates takes two batches. Raises SprintError where the counts cannot be read."""
    try:
        counts = json.loads(file.read_text())
        flops = counts["G"]["all"]["flops"] + counts["D"]["all"]["flops"]
        rate = 2 * counts["batch"] * H100_FLOPS * ASSUMED_SHARE / flops
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SprintError(
            f"{file}: no counted FLOPs there ({error}); say with --need what a step takes"
        ) from error
    how = f"assumed, not measured: counted FLOPs of 0.6B at {ASSUMED_SHARE:.0%} of an H100's 989 TFLOP/s"
    return Need(rate, how)


def judged(found: dict, need: Need) -> dict:
    """The need, who keeps up with it, and the cores that one worker's reading takes at that rate."""
    rows = {int(workers): row for workers, row in found["workers"].items()}
    verdicts = {}
    for kind, key in (("measured", "samples_per_second"), ("core_each", "core_each")):
        rates = {workers: row[key]["median"] for workers, row in rows.items()}
        verdicts[kind] = verdict(rates, need.samples_per_second)._asdict()
    seconds = rows[min(rows)]["cpu_ms_per_sample"]["median"] / 1000
    return {"need": need._asdict(), "verdict": verdicts, "cores_at_need": seconds * need.samples_per_second}


# ---- the page ---------------------------------------------------------------------------------------


def spread(values: dict[str, float] | None, digits: int) -> str:
    if not values:
        return ""
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f}-{values['max']:.{digits}f})"


def said(verdict: dict) -> str:
    if verdict["workers"] is None:
        return f"**no**: {verdict['factor']:.2f} of the need at best"
    return f"with {verdict['workers']}, {verdict['factor']:.1f} times the need"


def page(results: dict) -> str:
    formats, (before, after) = results["formats"], results["load_average"]
    return "\n".join(
        [
            f"{results['size']} px, {results['samples']} samples in batches of {results['batch']}; "
            f"{results['cores']} cores, load {before:.1f} before and {after:.1f} after; "
            f"medians of {results['rounds']} rounds (and their spread)",
            "",
            "| format | KB a sample | workers | samples/s | a core each | CPU ms a sample | MB/s |",
            "|---|---|---|---|---|---|---|",
            *(line for name, found in formats.items() for line in rate_lines(name, found)),
            "",
            "| format | need, samples/s | keeps up here | with a core each | cores it takes | "
            "2 workers over 1, here | with a core each |",
            "|---|---|---|---|---|---|---|",
            *(need_line(name, found) for name, found in formats.items()),
            "",
            *dict.fromkeys(
                f"Need of {'scenes' if name == SCENES else 'every format but scenes'}: {found['need']['how']}."
                for name, found in formats.items()
                if name != CONTROL
            ),
            "Pictures must also be encoded (text encoder, autoencoder): the step's work, not the loader's.",
            *["huggingface is skipped: pip install 'sprint-distill[data]'"] * ("huggingface" not in formats),
        ]
    )


def rate_lines(name: str, found: dict) -> Iterator[str]:
    size = found["bytes_per_sample"]
    for workers, row in found["workers"].items():
        rate = row["samples_per_second"]
        yield (
            f"| {name} | {size / 1000:.0f} | {workers} | {spread(rate, 0)} | {spread(row['core_each'], 0)} | "
            f"{spread(row['cpu_ms_per_sample'], 2)} | {rate['median'] * size / 1e6:.0f} |"
        )


def need_line(name: str, found: dict) -> str:
    gains = found["two_workers_over_one"]
    gained = f"{spread(gains.get('measured'), 2)} | {spread(gains.get('core_each'), 2)}"
    if name == CONTROL:
        return f"| {name} | | | | | {gained} |"
    verdicts = found["verdict"]
    return (
        f"| {name} | {found['need']['samples_per_second']:.1f} | {said(verdicts['measured'])} | "
        f"{said(verdicts['core_each'])} | {found['cores_at_need']:.2f} | {gained} |"
    )


# ---- the command ------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> None:
    """Raises SprintError for what cannot be measured."""
    if args.size < CELL or args.size % CELL:
        raise SprintError(f"--size {args.size}: it must be a multiple of {CELL}")
    for name in ("batch", "rounds"):
        if getattr(args, name) < 1:
            raise SprintError(f"--{name} {getattr(args, name)}: it must be at least 1")
    if min(args.workers) < 1:
        raise SprintError(f"--workers {min(args.workers)}: it must be at least 1")
    if args.samples < args.batch or args.samples % args.batch:
        raise SprintError(f"--samples {args.samples}: it must be a multiple of --batch {args.batch}")
    if args.need is not None and args.need <= 0:
        raise SprintError(f"--need {args.need}: it must be more than 0 samples a second")
    if args.need is None and args.size != 1024:
        raise SprintError(
            f"--size {args.size}: FLOPs are counted at 1024 px; say with --need what a step takes"
        )


def run(args: argparse.Namespace, folder: Path) -> dict:
    need = need_by_flops(RESULTS / COUNTED) if args.need is None else Need(args.need, "given")
    keep_freed_memory()  # as a run does
    before = os.getloadavg()[0]
    formats = make_formats(folder, args.samples, args.size)
    found = measure(formats, args)
    for name in formats:
        found[name] |= judged(found[name], need_of_scenes(args.rounds) if name == SCENES else need)
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
