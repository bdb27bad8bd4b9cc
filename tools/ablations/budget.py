"""How many seeds the comparisons with the paper need to leave the noise, by an earlier list's spreads.

    python -m tools.ablations.budget
    python -m tools.ablations.budget tools/results/ablations.json --seeds 3 5 8 12

A difference d̄ of n seeds leaves the noise where |d̄| > t(n − 1) · s / √n, s its standard deviation from seed to seed:
of each row its own, but not below the median over the rows of several seeds, since two or three say little of it. Of a
row of one seed s is that median. What a difference truly is, nobody knows: it is drawn around k times the one that was
seen, with k times the variance of its error, where k = 1 − 1 / mean z², z = the difference over its error, is the share
of what was seen that is no noise (James and Stein; without comparisons that are beyond doubt). Updates and prompts are
taken to be as they were: what longer runs change, spreads do not tell.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from sprint.base.door import read_json
from sprint.base.errors import SprintError

RESULTS = Path(__file__).resolve().parents[1] / "results" / "ablations.json"
SEEDS = (3, 5, 8, 12, 16)
DRAWS = 20_000  # of what a difference may truly be
BEYOND_DOUBT = 6.0  # errors: no part of the estimate of k, which is of the doubtful ones
PAPERS = ("agrees", "disagrees", "within the noise")


@dataclass(frozen=True)
class Comparison:
    """One measure of one row against its base.

    difference   mean over the seeds that both have
    deviation    from seed to seed
    seeds        that it was seen with
    """

    name: str
    difference: float
    deviation: float
    seeds: int

    @property
    def error(self) -> float:
        return self.deviation / math.sqrt(self.seeds)

    def needed(self, most: int = 1000) -> int | None:
        """Fewest seeds at which the difference, were it the true one, leaves the noise half of the time; None beyond
        `most`."""
        for n in range(2, most + 1):
            if abs(self.difference) > stats.t.ppf(0.975, n - 1) * self.deviation / math.sqrt(n):
                return n
        return None

    def chance(self, seeds: int, kept: float) -> float:
        """Of leaving the noise with so many seeds."""
        drawn = np.random.default_rng(0)
        true = kept * self.difference + math.sqrt(kept) * self.error * drawn.standard_normal(DRAWS)
        shift = np.abs(true) * math.sqrt(seeds) / self.deviation
        limit = stats.t.ppf(0.975, seeds - 1)
        beyond = stats.nct.sf(limit, seeds - 1, shift) + stats.nct.cdf(-limit, seeds - 1, shift)
        return float(np.nanmean(beyond))


def comparisons(record: dict) -> list[Comparison]:
    """Every one with the paper that a record of the ablations has a word on."""
    seen = []
    for group in record["groups"]:
        steps, rows = group["compared_at_steps"], group["rows"]
        base = next(row for row in rows if row["outcome"] == "base")
        for row in rows if not group["ours"] else ():
            measures = [m for m, word in row["verdicts"].items() if word in PAPERS]
            for measure in measures:
                mine, bases = (_values(r, measure, steps) for r in (row, base))
                paired = [mine[seed] - bases[seed] for seed in sorted(mine.keys() & bases.keys())]
                if paired:
                    seen.append((f"{group['title']}: {row['label']}, {measure}", measure, paired))
    usual = {
        measure: statistics.median(statistics.stdev(d) for _, m, d in seen if m == measure and len(d) > 2)
        for measure in ("fid", "score")
    }
    norms = [statistics.stdev(_values(r, "norm", "").values()) for r in _bases(record)]
    usual["norm"] = math.sqrt(2) * statistics.median(norms)  # no row of several seeds has it: as if unpaired
    return [
        Comparison(name, statistics.fmean(d), max(usual[m], statistics.stdev(d) if len(d) > 2 else 0), len(d))
        for name, m, d in seen
    ]


def _bases(record: dict) -> list[dict]:
    return [row for group in record["groups"] for row in group["rows"] if row["outcome"] == "base"]


def _values(row: dict, measure: str, steps: str) -> dict[int, float]:
    """By seed; of the gradient norm the logarithm to base 10."""
    runs = [run for run in row["runs"] if run and run["scores"]]
    if measure == "norm":
        return {run["seed"]: math.log10(run["norms"]["grad_norm"]) for run in runs}
    return {run["seed"]: run["scores"][steps][measure] for run in runs}


def kept_share(found: Sequence[Comparison]) -> float:
    """k: how much of the doubtful differences is no noise, 0 to 1."""
    squares = [(each.difference / each.error) ** 2 for each in found]
    doubtful = [square for square in squares if square < BEYOND_DOUBT**2]
    return max(0.0, 1 - 1 / statistics.fmean(doubtful)) if doubtful else 1.0


def table(found: Sequence[Comparison], seeds: Sequence[int]) -> str:
    """Markdown: needed seeds if what was seen is true, and chances; last, how many are expected to leave the noise."""
    kept = kept_share(found)
    lines = ["| | difference ± error | seeds, if that is true | " + " | ".join(map(str, seeds)) + " |"]
    lines.append("|---" * (3 + len(seeds)) + "|")
    totals = dict.fromkeys(seeds, 0.0)
    for each in found:
        sure = abs(each.difference) / each.error >= BEYOND_DOUBT
        chances = {n: each.chance(n, 1.0 if sure else kept) for n in seeds}
        totals = {n: totals[n] + chances[n] for n in seeds}
        cells = [each.name, f"{each.difference:+.3f} ± {each.error:.3f}", str(each.needed() or "over 1000")]
        lines.append("| " + " | ".join([*cells, *(f"{chance:.2f}" for chance in chances.values())]) + " |")
    sums = " | ".join(f"**{total:.1f}**" for total in totals.values())
    lines.append(f"| of {len(found)} expected to leave the noise; k = {kept:.2f} | | | {sums} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.ablations.budget",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="an ablations.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="to tell the chances for")
    args = parser.parse_args(argv)
    if min(args.seeds) < 2:
        print("budget: --seeds: give at least 2, one has no spread", file=sys.stderr)
        return 2
    try:
        print(table(comparisons(read_json(args.results)), args.seeds))
    except SprintError as error:
        print(f"budget: {error}", file=sys.stderr)
        return 2
    except (KeyError, TypeError, json.JSONDecodeError):
        print(f"budget: {args.results}: not a record of the ablations", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
