"""The command line: one function per verb. Heavy imports happen inside the verb that needs them."""

import argparse
import contextlib
import logging
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sprint import __version__
from sprint.cli_evaluate import add_compare, add_evaluate
from sprint.cli_search import add_search_steps
from sprint.cli_shared import add_verb, at_least_one, device_here, numbers, quiet_libraries
from sprint.ending import run_to_end
from sprint.errors import SprintError

INTERRUPTED = 130  # the shell's code for Ctrl-C
WARNINGS_OF_A_KIND = 5  # shown; a data set of long captions has thousands

DESCRIPTION = """\
Distil a flow-matching image model into one that samples in 1 to 4 steps.

  sprint distill tiny                     the whole path on a laptop, ten minutes, nothing to download
  sprint distill 0.6b data.path=pictures  the same for Sana 0.6B, on GPUs
  sprint cache 0.6b data.path=pictures    encode pictures and captions once, before training
  sprint sample runs/tiny/student --prompt "a red circle" --steps 1
  sprint convert teacher.safetensors      a teacher in TrigFlow form, proved lossless, reversible
  sprint evaluate runs/tiny               draw, score, time: a table and a page, worst pictures first
  sprint compare evaluations/a evaluations/b
  sprint search-steps runs/tiny/student   better times for 2 to 4 steps
"""

DISTILL = """\
Adapt a teacher (stage 1), distil it (stage 2), draw, score and write runs/NAME/report.html.
Interrupted, the same command goes on where it stopped.

  sprint distill tiny                                   ten minutes on two CPU cores
  sprint distill tiny name=short distill.steps=400      any key of the recipe can be set
  sprint distill 0.6b data.path=pictures                a folder of NAME.jpg beside NAME.txt
  sprint distill 1.6b --dry-run                         parameters and memory, nothing is run
"""

CACHE = """\
Encode a recipe's pictures and captions once, into shards. Training from them loads neither the text encoder
nor the autoencoder: data.kind=cache data.path=FOLDER. Without pictures the teacher draws what prompts say.
Interrupted, the same command goes on where it stopped: it keeps shards of the right size, and --verify
compares their hashes. Of several captions of a picture one is drawn here, for all epochs. Skipped samples are
left out, so that training meets the others in another order than without a cache.

  sprint cache 0.6b data.path=pictures -o caches/pictures                 then: sprint distill 0.6b data.kind=cache ...
  sprint cache 0.6b --from-prompts data.path=prompts.txt data.seed=1      a prompt a line; the teacher draws
  sprint cache tiny --count 28800 --dtype fp32                            scenes never end: say how many
  sprint cache 0.6b data.path=pictures -o caches/pictures --verify        read back, compare every hash

Several processes share the work:  torchrun --nproc_per_node 8 -m sprint cache 0.6b data.path=pictures
"""

SAMPLE = """\
Draw one picture per prompt. A picture depends on its prompt and its own seed only.

  sprint sample runs/tiny/student --prompt "a red circle" --steps 1
  sprint sample runs/tiny/student --prompt "a dot" --prompt "two blue squares" --seed 7 --out pictures
  sprint sample runs/tiny/student --prompt "a red circle" --times 1.5708,1.2,0.8,0
  sprint sample tiny --prompt "a red circle" --steps 20 --guidance 4.5
  sprint sample STUDENT --prompt "a fox" --device cuda --dtype bf16 --compile
"""

CONVERT = """\
Convert between original and diffusers naming and certify the result: every tensor bit for bit, and the
flow velocity recovered from the TrigFlow view. A failed certificate leaves nothing behind.

  sprint convert teacher.safetensors                               writes the folder teacher-trigflow
  sprint convert teacher.pth -o teacher --verify full              the whole network in fp64, both ways back
  sprint convert teacher --to original -o teacher.safetensors      back to Sana's own names
  sprint convert runs/tiny/student --to original -o student.pth
"""


def command(argv: list[str] | None = None) -> None:
    """`main`, and with it the end of the process: what `sprint` and `python -m sprint` start."""
    run_to_end(lambda: main(argv))


def main(argv: list[str] | None = None) -> None:
    """Run one verb. Exits with 2 after bad input and 130 after Ctrl-C, each with one line."""
    with _warnings_as_lines():
        try:
            args = _parse(argv)
            args.verb(args)
        except SprintError as error:
            sys.exit(_complain(str(error), 2))
        except KeyboardInterrupt:
            sys.exit(_complain("interrupted; the same command goes on from there", INTERRUPTED))
        except OSError as error:
            sys.exit(_complain(f"{error.filename or 'file system'}: {error.strerror or error}", 2))


def _complain(text: str, code: int) -> int:
    print(f"sprint: {' '.join(text.split())}", file=sys.stderr)
    return code


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
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    args.argv = sys.argv[1:] if argv is None else argv
    return args


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sprint", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"sprint {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_distill(verbs)
    _add_cache(verbs)
    _add_sample(verbs)
    _add_convert(verbs)
    add_evaluate(verbs)
    add_compare(verbs)
    add_search_steps(verbs)
    return parser


def _add_recipe(verb: argparse.ArgumentParser, example: str) -> None:
    verb.add_argument("recipe", help="a name in recipes/ (tiny, 0.6b, 1.6b, 4.8b) or a YAML file")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=f"e.g. {example}")


# ---- distill ----------------------------------------------------------------------------------------


def _add_distill(verbs) -> None:
    verb = add_verb(
        verbs, "distill", "turn a teacher into a student: adapt, distil, evaluate, report", DISTILL
    )
    _add_recipe(verb, example="distill.steps=400 name=try")
    verb.add_argument(
        "--dry-run", action="store_true", help="print the recipe, parameter counts and a memory plan"
    )
    verb.set_defaults(verb=distill)


def distill(args: argparse.Namespace) -> None:
    from sprint.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        from sprint.plan import dry_run

        print(dry_run(recipe))
        return
    quiet_libraries()
    from sprint.train.loop import Interrupted
    from sprint.train.run import distill as run

    try:
        page = run(recipe, command=shlex.join(["sprint", "distill", args.recipe, *args.overrides]))
    except Interrupted as stopped:
        sys.exit(_complain(f"{stopped}; the same command goes on from there", INTERRUPTED))
    if page:
        print(f"report: {page}\nstudent: {page.parent / 'student'}")


# ---- cache ------------------------------------------------------------------------------------------


def _add_cache(verbs) -> None:
    verb = add_verb(
        verbs, "cache", "encode pictures and captions once, so that training needs no encoders", CACHE
    )
    _add_recipe(verb, example="data.path=pictures")
    verb.add_argument("-o", "--out", type=Path, help="folder of the cache (default caches/NAME)")
    verb.add_argument("--count", type=at_least_one, metavar="N", help="only the first N samples")
    verb.add_argument(
        "--shard-size", type=at_least_one, default=1000, metavar="N", help="samples a shard (default 1000)"
    )
    verb.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="of what is stored (default bf16)"
    )
    verb.add_argument(
        "--from-prompts", action="store_true", help="the same as data.kind=prompts: the teacher draws"
    )
    verb.add_argument("--verify", action="store_true", help="make nothing: compare every file with its hash")
    verb.set_defaults(verb=cache)


def cache(args: argparse.Namespace) -> None:
    from sprint.recipe import load_recipe

    implied = ["data.kind=prompts"] * args.from_prompts + ["evaluate.prompts=0"]  # which only scenes allow
    keys = {override.partition("=")[0] for override in implied}
    given = [override for override in args.overrides if override.partition("=")[0] not in keys]
    recipe = load_recipe(args.recipe, [*given, *implied])
    folder = args.out or Path("caches") / recipe.name
    quiet_libraries()
    from sprint.caching import make_cache, verify_cache

    if args.verify:
        print(verify_cache(folder))
    else:
        print(make_cache(recipe, folder, args.count, args.shard_size, args.dtype))


# ---- sample -----------------------------------------------------------------------------------------


def _add_sample(verbs) -> None:
    verb = add_verb(verbs, "sample", "draw pictures with a student or a teacher", SAMPLE)
    verb.add_argument("model", help="a student or teacher folder, a hub id, or 'tiny', the built-in teacher")
    verb.add_argument("--prompt", action="append", required=True, help="may be given several times")
    verb.add_argument("--steps", type=int, help="1 to 4 for students (default 2), 20 for teachers")
    verb.add_argument("--times", help="TrigFlow times from at most 1.5708 to 0, such as 1.5708,1.3,0")
    verb.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    verb.add_argument("--guidance", type=float, default=4.5, help="guidance scale (default 4.5)")
    verb.add_argument("--size", type=int, help="pixels a side (default: the model's own)")
    verb.add_argument(
        "--out", type=Path, default=Path("samples"), help="folder for the PNG files (default samples)"
    )
    verb.add_argument("--device", help="cpu, cuda, … (default: cuda where there is one)")
    verb.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default fp32)"
    )
    verb.add_argument(
        "--compile", action="store_true", help="compile first: minutes, pays for hundreds of prompts"
    )
    verb.set_defaults(verb=sample)


def sample(args: argparse.Namespace) -> None:
    times = None if args.times is None else numbers("--times", args.times)
    if args.out.exists() and not args.out.is_dir():
        raise SprintError(f"--out {args.out} is not a folder; give another one")
    device = device_here(args.device)
    quiet_libraries()
    from sprint.convert.convert import DTYPES
    from sprint.evaluate.store import write_png
    from sprint.generate import StudentGenerator, load_generator

    generator = load_generator(args.model, device, DTYPES[args.dtype])
    if args.compile:
        generator.compile()
    steps = args.steps
    if steps is None and times is None:
        steps = 2 if isinstance(generator, StudentGenerator) else 20
    seeds = list(range(args.seed, args.seed + len(args.prompt)))
    with _compiler_errors():
        pictures = generator.pictures(args.prompt, seeds, steps, args.guidance, args.size, times)
    for picture, seed in zip(pictures, seeds, strict=True):
        print(write_png(args.out / f"{seed:06d}.png", picture))


@contextlib.contextmanager
def _compiler_errors() -> Iterator[None]:
    """What torch.compile cannot do, for want of a C++ compiler say, in one line."""
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException

        if not isinstance(error, TorchDynamoException):
            raise
        reason = str(error).strip().split("\n")[0]
        raise SprintError(f"--compile does not work here: {reason}") from error


# ---- convert ----------------------------------------------------------------------------------------


def _add_convert(verbs) -> None:
    verb = add_verb(
        verbs, "convert", "a flow-matching teacher in TrigFlow form, proved lossless; and back", CONVERT
    )
    verb.add_argument(
        "source", help=".safetensors, .pth, a folder (sharded, diffusers, converted) or a hub id"
    )
    verb.add_argument("-o", "--out", help="output folder, or a .safetensors/.pth file with --to original")
    verb.add_argument("--to", choices=("trigflow", "flow", "original"), default="trigflow")
    verb.add_argument("--verify", choices=("fast", "full", "off"), default="fast")
    verb.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="round the weights to this")
    verb.add_argument(
        "--time-scale", choices=("sparse", "dense"), help="what the teacher embeds: 1000·t or t itself"
    )
    verb.add_argument("--cross-attention-heads", type=int, help="where neither config nor width tells")
    verb.set_defaults(verb=convert)


def convert(args: argparse.Namespace) -> None:
    quiet_libraries()
    from sprint.convert.checkpoint import TIMES
    from sprint.convert.convert import convert as run
    from sprint.convert.convert import describe
    from sprint.models.family import resolve

    result = run(
        resolve(args.source),
        args.out,
        to=args.to,
        verify=args.verify,
        dtype=args.dtype,
        time_scale=TIMES.get(args.time_scale),
        cross_attention_heads=args.cross_attention_heads,
    )
    print(describe(result))
