"""`sprint doctor`: what is wrong with a model, a run, a recipe or data, and what to do."""

import argparse
import sys
from pathlib import Path

from sprint.base.errors import SprintError
from sprint.cli.shared import add_verb, place, quiet_libraries

DOCTOR = """\
Look at one thing and say in plain lines what is wrong and what to do. The first line is the verdict; the worst
stands first. Nothing is trained, downloaded for a recipe, or changed. Exit code 1 where something is wrong.

  sprint doctor runs/tiny                         did the weights move, skipped updates, norms, dead heads
  sprint doctor student.pth --against TEACHER     of any trainer: noise instead of pictures? finite, moved, clock
  sprint doctor tiny --kind model                 a model: whole, its parts fit, predicts pictures
  sprint doctor 0.6b data.path=pictures           a recipe on this machine: GPUs, memory, disk, downloads, versions
  sprint doctor pictures                          data: counts, sizes, captions, small, repeated, bad; a sheet
"""


def add_doctor(verbs) -> None:
    verb = add_verb(verbs, "doctor", "say what is wrong with a model, a run, a recipe or data", DOCTOR)
    verb.add_argument("thing", help="a model, a run's folder, a recipe or data")
    verb.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of a recipe, or data.size=512 for data"
    )
    verb.add_argument("--kind", choices=("model", "run", "recipe", "data"), help="where nobody can tell")
    verb.add_argument(
        "--against", metavar="TEACHER", help="of a model or a run: how far its weights have moved"
    )
    verb.add_argument(
        "--time-scale",
        choices=("sparse", "dense"),
        help="of a model that does not tell: it embeds 1000·t or t",
    )
    verb.add_argument("--cross-attention-heads", type=int, help="of a model that does not tell")
    verb.add_argument("--sample-size", type=int, help="of a model that does not tell: latent cells a side")
    verb.add_argument("--weights", metavar="KEY", help="which of a file's networks: state_dict_ema, …")
    verb.add_argument("--variant", metavar="NAME", help="which of a folder's files: bf16, …")
    verb.add_argument(
        "--out", type=place, default=Path("doctor"), help="folder for the sheet of pictures (default doctor)"
    )
    verb.set_defaults(verb=doctor)


def doctor(args: argparse.Namespace) -> None:
    quiet_libraries()
    from sprint.doctor.examine import examine
    from sprint.doctor.findings import exit_code, lines, verdict
    from sprint.doctor.model import Opening
    from sprint.doctor.what import Kind, kind_of
    from sprint.weights.checkpoint import TIMES

    kind = kind_of(args.thing, args.kind and Kind(args.kind))
    _refuse_unread(args, kind.value)
    opening = Opening(
        TIMES.get(args.time_scale),
        args.cross_attention_heads,
        args.sample_size,
        args.weights,
        args.variant,
    )
    _, findings = examine(args.thing, args.overrides, args.against, opening, kind, args.out)
    print(verdict(args.thing, findings), "", *lines(findings), sep="\n")
    if code := exit_code(findings):
        sys.exit(code)


def _refuse_unread(args: argparse.Namespace, kind: str) -> None:
    """What was asked for and is not read is an error."""
    read = {
        "key=value": (args.overrides, ("recipe", "data")),
        "--against": (args.against, ("model", "run")),
        "--time-scale": (args.time_scale, ("model",)),
        "--cross-attention-heads": (args.cross_attention_heads, ("model",)),
        "--sample-size": (args.sample_size, ("model",)),
        "--weights": (args.weights, ("model",)),
        "--variant": (args.variant, ("model",)),
    }
    for option, (given, kinds) in read.items():
        if given and kind not in kinds:
            raise SprintError(f"{args.thing} is a {kind}; {option} is for a {' or a '.join(kinds)}")
