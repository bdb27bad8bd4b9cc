"""What several verbs of the command line share. Nothing heavy is imported before it is needed."""

import argparse
import logging
import sys

from sprint.base.errors import SprintError


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


def numbers(option: str, text: str, kind: type = float) -> list:
    """What an option says, such as "1,2,4". Raises SprintError."""
    example = "1,2,4" if kind is int else "1.5708,1.3,0"
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise SprintError(f"{option} {text}: write numbers with commas, such as {example}") from None


INTERRUPTED = 130  # the shell's code for Ctrl-C


def complain(text: str, code: int) -> int:
    print(f"sprint: {' '.join(text.split())}", file=sys.stderr)
    return code


def add_recipe(verb: argparse.ArgumentParser, example: str) -> None:
    verb.add_argument("recipe", help="tiny, 0.6b, 1.6b, 4.8b (`sprint recipes` lists all) or a YAML file")
    # without a default argparse counts them among the required arguments
    verb.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=f"e.g. {example}")
