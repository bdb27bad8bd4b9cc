"""`sprint compare`: several evaluations side by side."""

import argparse
from pathlib import Path

from sprint.cli.shared import add_verb, check_out, place

COMPARE = """\
Put evaluations side by side: one table with the best figure of each row marked, differences with their
standard errors, and the same prompts and seeds next to each other, worst difference first.

  sprint compare evaluations/before evaluations/after
  sprint compare evaluations/a evaluations/b evaluations/c --out a-b-c.html
  sprint compare evaluations/a/result.json evaluations/b/result.json
"""


def add_compare(verbs) -> None:
    verb = add_verb(verbs, "compare", "put evaluations side by side", COMPARE)
    verb.add_argument("results", nargs="+", help="folders that `sprint evaluate` wrote, or their result.json")
    verb.add_argument(
        "--out", type=place, default=Path("compare.html"), help="the page (default compare.html)"
    )
    verb.set_defaults(verb=compare)


def compare(args: argparse.Namespace) -> None:
    check_out("--out", args.out, folder=False)
    from sprint.evaluate.compare import compare as run

    print(run(args.results, args.out))
