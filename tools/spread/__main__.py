"""How far runs of one recipe lie apart: three seeds, and the first once more with a smaller processor's kernels.

    python -m tools.spread RECIPE [key=value ...] [--seeds 0 1 2] [--out FILE]

Each run is `sprint distill RECIPE name=NAME seed=SEED` in a process of its own, in runs/ as any other; what is done
is not done again, and the same command goes on where it stopped. Of the tiny recipe a run takes eight to ten minutes
on two quiet cores, the one with small kernels longer. Writes FILE for programs, by default what reports and cards of
the recipe quote (sprint/lab/spread.json), and prints a table for a page. Exit code 2 where a run fails.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.cli.shared import complain
from sprint.evaluate.models import OF_A_RUN, STUDENT, TEACHER
from sprint.evaluate.result import Result, read_result
from sprint.pages import html
from sprint.recipe.load import load_recipe, recipe_hash
from sprint.train.report.spread import SPREAD_FILE, Runs, Spread, family_hash
from tools.bench.measure import command, environment
from tools.kernels.__main__ import LEAST

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path("runs")
FIGURES = (("scenes", "scene score"), ("fid", "FID"))
OF_THE_TOOL = ("name", "seed")  # keys that it sets itself


class One(NamedTuple):
    """A run. kernels: whether a smaller processor's are forced."""

    name: str
    seed: int
    kernels: bool = False

    @property
    def environment(self) -> dict[str, str]:
        own = {key: value for key, value in os.environ.items() if key not in LEAST}
        return own | (LEAST if self.kernels else {})


def runs_of(recipe: str, seeds: Sequence[int]) -> list[One]:
    """Every seed, and the first again with other kernels."""
    stem = f"spread-{Path(recipe).stem}"
    return [*(One(f"{stem}-{seed}", seed) for seed in seeds), One(f"{stem}-kernels", seeds[0], kernels=True)]


def distill(arguments: Sequence[str], environment: dict[str, str]) -> int:
    """In a process of its own, since libraries choose their kernels once.  -> exit code"""
    command = [sys.executable, "-m", "sprint", "distill", *arguments]
    return subprocess.run(command, env=environment).returncode


def finished(one: One, recipe: str, overrides: Sequence[str]) -> Result:
    """The evaluation of a run, which is trained where it is not there yet.

    Raises SprintError where it cannot be, and for a folder that has a run of another recipe.
    """
    arguments = [recipe, *overrides, f"name={one.name}", f"seed={one.seed}"]
    folder, wanted = RUNS / one.name, recipe_hash(load_recipe(recipe, arguments[1:]))
    owner = folder / "recipe.hash"
    if owner.is_file() and owner.read_text().strip() != wanted:
        raise SprintError(f"{folder}: a run of another recipe; delete it, or give these runs another recipe")
    if not (folder / "report.html").is_file():
        print(f"{one.name}: {shlex.join(['sprint', 'distill', *arguments])}", flush=True)
        code = distill(arguments, one.environment)
        if code:
            raise SprintError(f"{one.name}: ended with {code}; the same command goes on from there")
    return read_result(folder / OF_A_RUN)


def collected(
    recipe: str, overrides: Sequence[str], ones: Sequence[One], results: Sequence[Result]
) -> Spread:
    """Scores and FID of every column that all runs have, at all their steps."""
    seeded = [result for one, result in zip(ones, results, strict=True) if not one.kernels]
    forced = next(result for one, result in zip(ones, results, strict=True) if one.kernels)
    here = environment()
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    figures = []
    for column in seeded[0].columns:
        for metric, name in FIGURES:
            found = [_figure(result, column.role, column.steps, metric, name) for result in seeded]
            other = _figure(forced, column.role, column.steps, metric, name)
            if None not in (*found, other):
                errors = [figure.error for figure in found if figure.error is not None]
                prompts = sum(errors) / len(errors) if errors else None
                values = [figure.value for figure in found]
                figures.append(Runs(column.role, column.steps, name, values, other.value, prompts))
    if not figures:
        raise SprintError("the runs have no score in common: evaluate.prompts is at least 2 for one")
    return Spread(
        recipe=family_hash(load_recipe(recipe, overrides)),
        name=recipe,
        seeds=[one.seed for one in ones if not one.kernels],
        figures=figures,
        machine=f"{here['cpu']}, {here['threads']} threads; {versions}; commit {here['commit']}",
        command=command(),
    )


def _figure(result: Result, role: str, steps: int, metric: str, name: str):
    column = next((c for c in result.columns if (c.role, c.steps) == (role, steps)), None)
    return column and column.figure(metric, name)


def table(spread: Spread) -> str:
    """For a page: student and teacher, score and FID, between runs beside over prompts."""
    shown = [runs for runs in spread.figures if runs.role in (STUDENT, TEACHER)]
    columns = list(dict.fromkeys((runs.role, runs.steps) for runs in shown))
    seeds = ", ".join(map(str, spread.seeds))
    lines = [["", *(f"{role}, {html.steps(steps)}" for role, steps in columns)], ["---"] * (len(columns) + 1)]
    for name, spec in (("scene score", ".3f"), ("FID", ".2f")):
        found = [spread.of(*column, name) for column in columns]
        lines += [
            [f"{name}, seeds {seeds}", *(_values(runs, spec) for runs in found)],
            [
                f"{name}, ± between seeds",
                *(f"{runs.mean:{spec}} ± {runs.deviation:{spec}}" for runs in found),
            ],
            [f"{name}, smaller processor's kernels", *(f"{runs.kernels:{spec}}" for runs in found)],
        ]
        if any(runs.prompts is not None for runs in found):
            lines.append([f"{name}, ± over prompts", *(f"± {runs.prompts:{spec}}" for runs in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _values(runs: Runs, spec: str) -> str:
    return " / ".join(f"{value:{spec}}" for value in runs.seeds)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.spread",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="name or file, such as tiny")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(0 1 2)")
    parser.add_argument("--out", type=Path, default=SPREAD_FILE, help="JSON (what reports quote)")
    args = parser.parse_intermixed_args(argv)
    try:
        for override in args.overrides:
            if override.partition("=")[0] in OF_THE_TOOL:
                raise SprintError(f"{override}: the tool sets that itself; leave it out")
        ones = runs_of(args.recipe, list(dict.fromkeys(args.seeds)))
        results = [finished(one, args.recipe, args.overrides) for one in ones]
        spread = collected(args.recipe, args.overrides, ones, results)
    except SprintError as error:
        return complain(str(error), 2)
    write_whole(args.out, spread.text())
    print(f"{table(spread)}\n{args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
