"""What `compile=true` costs: seconds of a first start, and of a second that finds the first one's graphs on the disk.

    python -m tools.bench.compiling                    # 20M Sana, batch 8, CPU: some minutes
    python -m tools.bench.compiling --network tiny     # the built-in family's own size and batch

Three processes, one after the other, with Inductor's folder of compiled graphs (TORCHINDUCTOR_CACHE_DIR) made for this
run and removed after it:

    eager          compile=false
    fresh folder   compile=true, nothing compiled yet
    kept folder    compile=true once more

Each builds stage 2's step (products=fastest) and makes pairs of generator and discriminator updates. Compiling is the
first pair, less the pair that the same process makes once all is compiled. Starting Python is not in it. The size of
the folder after each start tells whether the last one compiled anything anew. Writes
tools/results/bench_compiling_NETWORK_DEVICE.json.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from sprint.base.cpu import keep_freed_memory
from sprint.base.errors import SprintError
from tools.bench.measure import (
    Request,
    add_request,
    in_fresh_process,
    interleaved,
    requested,
    write_results,
)
from tools.bench.step import update_of
from tools.bench.variants import COMPILED, FASTEST, Variant

STARTS = {"eager": FASTEST, "fresh folder": COMPILED, "kept folder": COMPILED}
CACHE = "TORCHINDUCTOR_CACHE_DIR"
WANTED = 60.0  # seconds of compiling at most, the first time


def start_of(variant: Variant, request: Request, rounds: int) -> dict[str, float]:
    """Seconds of building the step, of its first G and D updates, and of such a pair later on."""
    keep_freed_memory()
    began = time.perf_counter()
    update = update_of(variant, request, checkpointing=False)
    built = time.perf_counter()

    def pair() -> None:
        update(0)
        update(1)

    (first,) = interleaved({"pair": pair}, repeats=1, warmup=0)["pair"]
    later = interleaved({"pair": pair}, rounds, warmup=1)["pair"]
    pair_later = statistics.median(later)
    return {
        "build": built - began,
        "first_pair": first,
        "later_pair": pair_later,
        "compiling": first - pair_later,
    }


def size_of(folder: Path) -> int:
    """Bytes of all files inside."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(request: Request, rounds: int) -> dict:
    with tempfile.TemporaryDirectory(prefix="inductor-") as folder:
        found, kept = {}, {}
        for name, variant in STARTS.items():
            found[name] = in_fresh_process(start_of, variant, request, rounds, variables={CACHE: folder})
            kept[name] = size_of(Path(folder))
    return {
        **request.record(),
        "rounds": rounds,
        "multiplied_by": COMPILED.multiply().__name__,
        "wanted_seconds_of_first_compile": WANTED,
        "seconds": found,
        "folder_bytes": kept,
    }


def page(results: dict) -> str:
    lines = [
        f"{results['network']}, batch {results['batch']}, {results['precision']}, {results['device']}; "
        f"blocks multiply by {results['multiplied_by']}",
        f"{'seconds':16}{'build':>10}{'first G+D':>12}{'later G+D':>12}{'compiling':>12}{'folder MB':>12}",
    ]
    for name, row in results["seconds"].items():
        line = f"{name:16}{row['build']:10.2f}{row['first_pair']:12.2f}{row['later_pair']:12.2f}"
        lines.append(line + f"{row['compiling']:12.2f}{results['folder_bytes'][name] / 1e6:12.1f}")
    short = ": falls short" * (results["seconds"]["fresh folder"]["compiling"] > WANTED)
    return "\n".join([*lines, f"wanted: compiling at most {WANTED:.0f} s in a fresh folder{short}"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_request(parser)
    args = parser.parse_args(argv)
    try:
        results = measure(requested(args), args.rounds)
    except (SprintError, torch.OutOfMemoryError) as error:
        print(f"bench_compiling: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(page(results))
    print(write_results(f"bench_compiling_{args.network}_{args.device}", results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
