"""The command line: one function per verb. Heavy imports happen inside the verb that needs them."""

import argparse
import contextlib
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator

from sprint import __version__
from sprint.base.ending import run_to_end
from sprint.base.errors import SprintError
from sprint.base.streams import outlive_readers
from sprint.base.system import check_system
from sprint.cli.cache import add_cache
from sprint.cli.compare import add_compare
from sprint.cli.convert import add_convert
from sprint.cli.distill import add_distill
from sprint.cli.doctor import add_doctor
from sprint.cli.evaluate import add_evaluate
from sprint.cli.recipes import add_recipes
from sprint.cli.sample import add_sample
from sprint.cli.search_steps import add_search_steps
from sprint.cli.shared import INTERRUPTED, TeachingParser, complain

WARNINGS_OF_A_KIND = 5  # shown; a data set of long captions has thousands

DESCRIPTION = """\
Distil a flow-matching image model into one that samples in 1 to 4 steps.

  sprint distill tiny                     the whole path on a laptop, ten minutes, nothing to download
  sprint distill 0.6b data.path=pictures  the same for Sana 0.6B, on GPUs
  sprint recipes tiny > mine.yaml         a recipe to edit; `sprint recipes` lists them
  sprint cache 0.6b data.path=pictures    encode pictures and captions once, before training
  sprint sample runs/tiny/student --prompt "a red circle" --steps 1
  sprint convert teacher.safetensors      a teacher in TrigFlow form, proved lossless, reversible
  sprint evaluate runs/tiny               draw, score, time: a table and a page, worst pictures first
  sprint compare evaluations/a evaluations/b
  sprint search-steps runs/tiny/student   better times for 2 to 4 steps
  sprint doctor runs/tiny                 what is wrong with a run, a model, a recipe or data, and what to do
"""


def command(argv: list[str] | None = None) -> None:
    """`main`, and with it the end of the process: what `sprint` and `python -m sprint` start."""
    outlive_readers()
    run_to_end(lambda: main(argv))


def main(argv: list[str] | None = None) -> None:
    """Run one verb. Exits with 2 after bad input, or for want of memory, and 130 after Ctrl-C, each with one line."""
    with _warnings_as_lines():
        try:
            check_system()
            args = _parse(argv)
            args.verb(args)
            sys.stdout.flush()
        except SprintError as error:
            sys.exit(complain(str(error), 2))
        except KeyboardInterrupt:
            sys.exit(complain("interrupted; the same command goes on from there", INTERRUPTED))
        except OSError as error:
            sys.exit(complain(f"{error.filename or 'file system'}: {error.strerror or error}", 2))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            what = str(error).strip().partition("\n")[0][:200]
            sys.exit(complain(f"out of memory: take smaller batches or pictures ({what})", 2))


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the CPU, for which torch has no class of its own."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


# ---- what other libraries say -----------------------------------------------------------------------


class _Lines(logging.Handler):
    """The project's own warnings as lines beside the progress bar: each once, and few of a kind."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: set[str] = set()
        self.kinds: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        text = record.getMessage()
        if text in self.texts or self.kinds[record.msg] == WARNINGS_OF_A_KIND:
            return
        self.texts.add(text)
        self.kinds[record.msg] += 1
        more = "; more of this kind are not shown" * (self.kinds[record.msg] == WARNINGS_OF_A_KIND)
        tqdm.write(f"sprint: {' '.join(text.split())}{more}", file=sys.stderr)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Our warnings reach the terminal; those of libraries do not, unless Python was asked for them (-W)."""
    log, lines = logging.getLogger("sprint"), _Lines()
    log.addHandler(lines)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        log.removeHandler(lines)


# ---- the parser -------------------------------------------------------------------------------------


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """As argparse does, but `key=value` may also stand after an option."""
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        parser.exit(2)
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    args.argv = sys.argv[1:] if argv is None else argv
    return args


def build_parser() -> argparse.ArgumentParser:
    parser = TeachingParser(
        prog="sprint", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"sprint {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    add_distill(verbs)
    add_recipes(verbs)
    add_cache(verbs)
    add_sample(verbs)
    add_convert(verbs)
    add_evaluate(verbs)
    add_compare(verbs)
    add_search_steps(verbs)
    add_doctor(verbs)
    return parser
