"""Rehearses a recipe: everything of a distillation once, at its real size, with random weights.

    python -m tools.rehearsal 0.6b                         the evening before: what `make rehearsal RECIPE=0.6b` does
    python -m tools.rehearsal tiny                         the same in a minute
    python -m tools.rehearsal 1.6b text.max_length=100     with other settings
    python -m tools.rehearsal 0.6b --out somewhere         in another folder than runs/rehearsal/0.6b

A random teacher of the recipe's size, random encoders of the right widths, 24 captioned pictures; then the commands
that a person types: `sprint cache`, `sprint distill` (batches of 4: one update of stage 1, one of the generator, one of
the discriminator), and the student drawn by diffusers alone. The weights are random: pictures are noise. What shows is
that everything runs and opens, and what it costs beside the plan: rehearsal.html and rehearsal.json in the folder,
which stays. Interrupted, the same command goes on: parts that are done are not repeated.
"""

import argparse
import signal
import sys
from pathlib import Path

from sprint.base.errors import SprintError
from sprint.cli.shared import INTERRUPTED, complain
from tools.rehearsal.parts import Rehearsal
from tools.rehearsal.run import rehearse

OUT = Path("runs") / "rehearsal"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m tools.rehearsal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("recipe", help="tiny, 0.6b, 1.6b, 4.8b or a YAML file")
    found.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="of the recipe")
    found.add_argument("--out", type=Path, help="folder of the rehearsal (default runs/rehearsal/RECIPE)")
    return found


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    try:
        folder = args.out or OUT / Path(args.recipe).name.removesuffix(".yaml")
        print(f"page: {rehearse(Rehearsal.of(args.recipe, args.overrides), folder)}")
    except SprintError as error:
        return complain(str(error), 2)
    except KeyboardInterrupt:
        return complain("interrupted; the same command goes on from there", INTERRUPTED)
    return 0


def _end(number, frame) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    sys.exit(main())
