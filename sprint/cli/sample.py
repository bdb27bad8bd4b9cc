"""`sprint sample`: pictures from prompts."""

import argparse
import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from sprint.base.errors import SprintError
from sprint.cli.shared import add_verb, check_guidance, check_out, check_seed, numbers, place, quiet_libraries

SAMPLE = """\
Draw one picture per prompt, named by its seed; pictures that are there stay, and the next one of the same
seed is 000000-2.png. A picture depends on its prompt and its own seed only.

  sprint sample runs/tiny/student --prompt "a red circle" --steps 1
  sprint sample runs/tiny/student --prompt "a dot" --prompt "two blue squares" --seed 7 --out pictures
  sprint sample runs/tiny/student --prompt "a red circle" --times 1.5708,1.2,0.8,0
  sprint sample tiny --prompt "a red circle" --steps 20 --guidance 4.5
  sprint sample STUDENT --prompt "a fox" --device cuda --dtype bf16 --compile
"""


def add_sample(verbs) -> None:
    verb = add_verb(verbs, "sample", "draw pictures with a student or a teacher", SAMPLE)
    verb.add_argument(
        "model", help="a student, teacher or run folder, a hub id, or 'tiny', the built-in teacher"
    )
    verb.add_argument(
        "--family", help="folder or hub id of text encoder and autoencoder, where the model has none"
    )
    verb.add_argument("--prompt", action="append", required=True, help="may be given several times")
    verb.add_argument("--steps", type=int, help="1 to 4 for students (default 2), 20 for teachers")
    verb.add_argument("--times", help="TrigFlow times from at most 1.5708 to 0, such as 1.5708,1.3,0")
    verb.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    verb.add_argument("--guidance", type=float, default=4.5, help="guidance scale (default 4.5)")
    verb.add_argument("--size", type=int, help="pixels a side (default: the model's own)")
    verb.add_argument(
        "--out", type=place, default=Path("samples"), help="folder for the PNG files (default samples)"
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
    check_out("--out", args.out)
    check_seed(args.seed)
    check_guidance(args.guidance)
    from sprint.base.place import usable_device

    device = usable_device(args.device)
    quiet_libraries()
    from sprint.base.dtypes import DTYPES
    from sprint.pages.png import write_png
    from sprint.sample.load import load_generator

    generator = load_generator(args.model, device, DTYPES[args.dtype], args.family)
    if args.compile:
        generator.compile()
    steps = args.steps
    if steps is None and times is None:
        steps = generator.default_steps
    seeds = list(range(args.seed, args.seed + len(args.prompt)))
    with compiler_errors():
        pictures = generator.pictures(args.prompt, seeds, steps, args.guidance, args.size, times)
    for picture, seed in zip(pictures, seeds, strict=True):
        print(write_png(free_name(args.out, f"{seed:06d}", ".png"), picture))


def free_name(folder: Path, stem: str, suffix: str) -> Path:
    """FOLDER/000007.png, or where an earlier call left one 000007-2.png, 000007-3.png: nothing is overwritten."""
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    files = (folder / f"{name}{suffix}" for name in names)
    return next(file for file in files if not os.path.lexists(file))


@contextlib.contextmanager
def compiler_errors() -> Iterator[None]:
    """What torch.compile cannot do, for want of a C++ compiler say, in one line."""
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException

        if not isinstance(error, TorchDynamoException):
            raise
        reason = str(error).strip().split("\n")[0]
        raise SprintError(f"--compile does not work here: {reason}") from error
