"""`sprint evaluate`: what a model is worth."""

import argparse
import shlex
from pathlib import Path

from sprint.base.errors import SprintError
from sprint.cli.shared import (
    add_verb,
    at_least_one,
    check_guidance,
    check_out,
    check_seed,
    numbers,
    place,
    quiet_libraries,
)
from sprint.evaluate.metrics.registry import METRICS, described

EVALUATE = f"""\
Draw with a model and measure: a table, OUT/result.json and OUT/index.html with the pictures, worst first.
Pictures are drawn once for each prompt and seed; interrupted, the same command goes on where it stopped.
A metric whose weights are not here is left out with a line that says what to fetch. Figures of an earlier
evaluation in the same OUT stay where model, prompts, seeds and guidance are the same.

OUT of a run's folder is RUN/evaluation, where `sprint distill` has drawn and scored by the recipe's evaluate.*:
of it nothing is drawn again, and what is not said here is as the recipe says. A run on other data than the scenes
draws captions of its own, a line each in RUN/prompts.txt. OUT of any other model is evaluations/NAME.

  sprint evaluate runs/tiny                                      what the run drew, and how long pictures take
  sprint evaluate runs/tiny/student --steps 1 --metrics scenes --count 60
  sprint evaluate tiny --metrics scenes,latency                  the built-in teacher alone
  sprint evaluate STUDENT --teacher TEACHER --reference MJHQ-30K --dtype bf16 --device cuda
  sprint evaluate STUDENT --metrics geneval --geneval-metadata evaluation_metadata.jsonl

metrics:
{described()}

The tiny family is measured on 600 built-in scenes, others on the prompts of --reference and GenEval's. Several
processes share the drawing:  torchrun --nproc_per_node 8 -m sprint evaluate STUDENT --reference MJHQ-30K
"""


def add_evaluate(verbs) -> None:
    verb = add_verb(
        verbs, "evaluate", "measure a student: FID, CLIP score, GenEval, scenes, latency", EVALUATE
    )
    verb.add_argument(
        "model", help="a student, teacher or run folder, a hub id, or 'tiny', the built-in teacher"
    )
    verb.add_argument(
        "--family", help="folder or hub id of text encoder and autoencoder, where the model has none"
    )
    verb.add_argument("--teacher", help="another model, for a column of 20 steps (a run brings its own)")
    verb.add_argument("--metrics", help=f"some of {','.join(METRICS)} (default: those that fit the model)")
    verb.add_argument(
        "--steps",
        help="such as 1,2,4 (default: the run's recipe's, else 1,2,4 for students, 20 for teachers)",
    )
    verb.add_argument(
        "--out", type=place, help="folder of the result (default RUN/evaluation, else evaluations/NAME)"
    )
    verb.add_argument("--prompts", help="scenes, a folder with captions, or a text file with a prompt a line")
    verb.add_argument("--count", type=at_least_one, metavar="N", help="fewer pictures than the protocol's")
    verb.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    verb.add_argument("--guidance", type=float, help="guidance scale (default: the run's recipe's, else 4.5)")
    verb.add_argument(
        "--batch-size", type=at_least_one, help="pictures drawn together (50 at 64 px, else 10)"
    )
    verb.add_argument(
        "--reference",
        type=Path,
        help="real pictures for FID: MJHQ-30K, a folder or statistics (earlier runs': evaluations/.reference)",
    )
    verb.add_argument(
        "--inception-weights", help="local copy of FID's Inception (default: torch hub's cache)"
    )
    verb.add_argument(
        "--clip-model", help="hub id or folder, for CLIP score and GenEval (default: OpenAI's ViT-L/14)"
    )
    verb.add_argument("--geneval-metadata", help="evaluation_metadata.jsonl, its folder or a hub data set")
    verb.add_argument("--geneval-detector", help="hub id or folder of a Mask2Former (default: GenEval's)")
    verb.add_argument("--device", help="cpu, cuda, … (default: cuda where there is one)")
    verb.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default fp32)"
    )
    verb.set_defaults(verb=evaluate)


def evaluate(args: argparse.Namespace) -> None:
    metrics, steps = _names(args.metrics), [] if args.steps is None else numbers("--steps", args.steps, int)
    _check_numbers(args)
    quiet_libraries()
    from sprint.base.place import Place, check_launcher, usable_device
    from sprint.evaluate.choices import FEATURE_CACHE, REAL_FEATURE_CACHE, Options
    from sprint.evaluate.metrics.metric import Choices
    from sprint.evaluate.models import EVALUATIONS, evaluation_folder
    from sprint.evaluate.page import PAGE, result_table
    from sprint.evaluate.run import evaluate as run

    check_launcher()
    device = usable_device(args.device or str(Place.of_this_process().device))
    out = args.out or evaluation_folder(args.model)
    check_out("--out", out)
    choices = Choices(
        kept=out / FEATURE_CACHE,
        kept_real=(args.out.parent if args.out else EVALUATIONS) / REAL_FEATURE_CACHE,
        count=args.count,
        seed=args.seed,
        reference=args.reference,
        geneval_metadata=args.geneval_metadata,
        geneval_detector=args.geneval_detector,
        clip_model=args.clip_model,
        inception_weights=args.inception_weights,
        device=device,
    )
    options = Options(
        model=args.model,
        out=out,
        choices=choices,
        teacher=args.teacher,
        family=args.family,
        metrics=metrics,
        steps=steps,
        prompts=args.prompts,
        guidance=args.guidance,
        batch_size=args.batch_size,
        dtype=args.dtype,
        command=shlex.join(["sprint", *args.argv]),
    )
    if result := run(options):
        print(f"{result_table(result)}\nresult: {out / 'result.json'}\npage: {out / PAGE}")


def _check_numbers(args: argparse.Namespace) -> None:
    check_guidance(args.guidance)
    check_seed(args.seed)
    if args.count == 1:
        raise SprintError("--count 1: FID needs at least 2 pictures, and hundreds say little")


def _names(text: str | None) -> list[str]:
    return [] if text is None else [name.strip() for name in text.split(",")]
