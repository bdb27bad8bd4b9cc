"""`sprint distill`: a teacher becomes a student."""

import argparse
import shlex
import sys

from sprint.cli.shared import INTERRUPTED, add_recipe, add_verb, complain, quiet_libraries

DISTILL = """\
Adapt a teacher (stage 1), distil it (stage 2), draw, score and write runs/NAME/report.html.
Interrupted, the same command goes on where it stopped.

The built-in scenes are scored; of other data so many captions as evaluate.prompts says are drawn, not scored.
For programs the page is in report.json beside it, and what was drawn and scored, as `sprint evaluate runs/NAME`
does it, is in evaluation/result.json; the pictures are there too.

  sprint distill tiny                                   ten minutes on two CPU cores
  sprint distill tiny name=short distill.steps=400      any key of the recipe can be set
  sprint distill 0.6b data.path=pictures                a folder of NAME.jpg beside NAME.txt
  sprint distill 1.6b --dry-run                         parameters and memory, nothing is run
"""


def add_distill(verbs) -> None:
    verb = add_verb(
        verbs, "distill", "turn a teacher into a student: adapt, distil, evaluate, report", DISTILL
    )
    add_recipe(verb, example="distill.steps=400 name=try")
    verb.add_argument(
        "--dry-run", action="store_true", help="print the recipe, parameter counts and a memory plan"
    )
    verb.set_defaults(verb=distill)


def distill(args: argparse.Namespace) -> None:
    from sprint.recipe.load import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        from sprint.train.plan.page import page
        from sprint.train.plan.plan import dry_run

        print(*page(dry_run(recipe)), sep="\n")
        return
    quiet_libraries()
    from sprint.train.loop import Interrupted
    from sprint.train.run import distill as run

    try:
        page = run(recipe, command=shlex.join(["sprint", "distill", args.recipe, *args.overrides]))
    except Interrupted as stopped:
        sys.exit(complain(f"{stopped}; the same command goes on from there", INTERRUPTED))
    if page:
        print(f"report: {page}\nstudent: {page.parent / 'student'}")
