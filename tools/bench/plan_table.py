"""The memory that --dry-run plans for each GPU in stage 2: recipes by engine by number of GPUs, as a Markdown table.

    python -m tools.bench.plan_table
    python -m tools.bench.plan_table --no-recompute    # the same without activation checkpointing

A plan, not a measurement. Writes both to tools/results/plan-engines.json, in bytes.
"""

import argparse
import sys

from sprint.base.errors import SprintError
from sprint.recipe.load import load_recipe
from sprint.train.plan.page import CARDS, GIB, SPARE, smallest_card
from sprint.train.plan.plan import (
    ENGINES,
    GPU_COUNTS,
    build_networks,
    distill_memory,
    gpu_counts,
    totals_of,
    with_engine,
)
from tools.bench.measure import ROOT, write_results

SIZES = ("0.6b", "1.6b", "4.8b")
WHICH = ("kept", "recomputed")  # activations
Row = dict[str, str | int]


def rows_of(name: str) -> list[Row]:
    """Every engine and number of GPUs for the recipe of this name. Raises SprintError as `dry_run` does."""
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    networks, rows = build_networks(recipe), []
    for engine, choice in ENGINES.items():
        under = with_engine(recipe, *choice)
        for gpus in gpu_counts(under.engine):
            totals = totals_of(distill_memory(under, networks, gpus))
            sizes = {which: round(size) for which, size in totals._asdict().items()}
            rows.append({"recipe": name, "engine": engine, "gpus": gpus} | sizes)
    return rows


def markdown(rows: list[Row], which: str) -> str:
    """An engine a row, recipes and numbers of GPUs as columns; engines of one process are left out."""
    size = {(row["engine"], row["recipe"], row["gpus"]): row[which] for row in rows}
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    columns = [(name, gpus) for name in names for gpus in GPU_COUNTS]
    head = [f"{name.upper()}, {gpus}" if gpus == GPU_COUNTS[0] else str(gpus) for name, gpus in columns]
    lines = ["| GiB on each of so many GPUs | " + " | ".join(head) + " |", "|---" * (1 + len(columns)) + "|"]
    for engine in dict.fromkeys(row["engine"] for row in rows if row["gpus"] > 1):
        cells = [_cell(size[(engine, *column)]) for column in columns]
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    small, large = CARDS
    lines.append(
        f"\nPlain: fits {small} GB with {SPARE:.0%} to spare; with a star: {large} GB; bold: neither."
    )
    return "\n".join(lines)


def _cell(size: int) -> str:
    small, large = CARDS
    mark = {small: "{:.1f}", large: "{:.1f}*", None: "**{:.1f}**"}
    return mark[smallest_card(size)].format(size / GIB)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--no-recompute", action="store_true", help="the table without activation checkpointing"
    )
    args = parser.parse_args(argv)
    try:
        rows = [row for name in SIZES for row in rows_of(name)]
    except SprintError as error:
        print(f"plan_table: {error}", file=sys.stderr)
        return 2
    print(markdown(rows, WHICH[not args.no_recompute]))
    print(write_results("plan-engines", {"stage": "distill", "unit": "bytes on each GPU", "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
