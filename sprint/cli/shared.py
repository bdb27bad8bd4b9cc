"""What several verbs of the command line share. Nothing heavy is imported before it is needed."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from sprint.base.door import at_home
from sprint.base.errors import SprintError
from sprint.recipe.settings import GUIDANCE, SEED


def quiet_libraries() -> None:
    """No progress bars for reading and writing local files (downloads keep theirs), and errors only."""
    logging.getLogger("DeepSpeed").addFilter(_errors_only)  # it sets its own level, and talks, on import
    import diffusers.utils.logging
    import huggingface_hub.utils.logging
    import transformers.utils.logging

    huggingface_hub.utils.logging.set_verbosity_error()  # offline it tells of every retry

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of at least 1")
    return int(text)


class TeachingParser(argparse.ArgumentParser):
    """Tells of a wrong command line what is wrong, and what a right one looks like: its first example."""

    def error(self, message: str) -> NoReturn:
        lines = (line.strip() for line in (self.description or "").splitlines())
        example = next((line for line in lines if line.startswith("sprint ")), "")
        such = f"; right is, for example: {example.partition('  ')[0]}" * bool(example)
        self.exit(2, f"{self.prog}: error: {message}{such} ({self.prog} --help tells the rest)\n")


def add_verb(
    verbs: argparse._SubParsersAction, name: str, summary: str, description: str
) -> argparse.ArgumentParser:
    """A verb whose description keeps its lines.  -> its parser"""
    return verbs.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def numbers(option: str, text: str, kind: type = float, example: str = "1.5708,1.3,0") -> list:
    """What an option says, such as `example`, or "1,2,4" of whole numbers. Raises SprintError."""
    example = "1,2,4" if kind is int else example
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise SprintError(f"{option} {text}: write numbers with commas, such as {example}") from None


def check_seed(seed: int) -> None:
    """Raises SprintError for a --seed from which no generator counts up."""
    if not SEED.holds(seed):
        raise SprintError(f"--seed {seed}: give a whole number of {SEED.words}")


def check_guidance(scale: float | None) -> None:
    if scale is not None and not GUIDANCE.holds(scale):
        raise SprintError(f"--guidance {scale}: give a number {GUIDANCE.words}")


def place(text: str) -> Path:
    """Where an option says that something is written, ~ as the home folder. Raises SprintError."""
    if not text:
        raise SprintError("the name of the output is empty; name a place, or leave the option out")
    return at_home(text)


def check_out(option: str, out: Path, folder: bool = True) -> None:
    """Before anything is loaded or drawn for it: whether files can be written there.

    folder   whether `out` is a folder, else a file

    Raises SprintError where it is something else, lies in a file, or in what this user may not write to.
    """
    try:
        if out.exists() and out.is_dir() != folder:
            raise SprintError(f"{option} {out} is {'not a' if folder else 'a'} folder; give another one")
        near = next(place for place in (out.absolute(), *out.absolute().parents) if place.exists())
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or error
        raise SprintError(f"{option} {str(out)[:200]}: {why}") from error
    near = near if near.is_dir() or near != out.absolute() else near.parent
    if not near.is_dir():
        raise SprintError(f"{option} {out}: {near} is a file, not a folder; give another one")
    if not os.access(near, os.W_OK | os.X_OK):
        raise SprintError(f"{option} {out}: {near} cannot be written to; give another one")


INTERRUPTED = 130  # the shell's code for Ctrl-C


def complain(text: str, code: int) -> int:
    print(f"sprint: {' '.join(text.split())}", file=sys.stderr)
    return code


def add_recipe(verb: argparse.ArgumentParser, example: str) -> None:
    verb.add_argument("recipe", help="tiny, 0.6b, 1.6b, 4.8b (`sprint recipes` lists all) or a YAML file")
    # without a default argparse counts them among the required arguments
    verb.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=f"e.g. {example}")
