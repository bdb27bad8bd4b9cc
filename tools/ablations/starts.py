"""Stage 1 from both of its starts, side by side: the calibrated one and the paper's (norm weights at one).

    python -m tools.ablations.starts
    python -m tools.ablations.starts recipes/tiny.yaml --steps 300 --out tools/results

Same data, same noise, same steps. The flow loss on held-out batches, the same for all, is taken of the
teacher as it is, and of each start before its first step and after its last. Writes compare_starts.json and
compare_starts.svg.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone
from html import escape
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from tqdm import tqdm

from sprint.base.errors import SprintError
from sprint.base.files import write_whole
from sprint.base.names import resolve
from sprint.data.batch import Batch
from sprint.data.batching import batch_positions, encode, prefetch
from sprint.data.source import open_source
from sprint.engine.batches import to_device
from sprint.models.teacher import DENSE_TIME
from sprint.models.view import TrigFlowView
from sprint.pages.chart import Point, line_chart
from sprint.recipe.load import load_recipe
from sprint.recipe.schema import AdaptStart, Recipe
from sprint.train.adapt import AdaptStage, FlowDraws, draw_flow, flow_loss
from sprint.train.run import Run
from sprint.train.start import start_of_adaptation
from sprint.weights.load import load_teacher
from tools.bench.measure import command

ROOT = Path(__file__).resolve().parents[2]
STEPS, BATCH_SIZE, HELD_OUT_BATCHES = 150, 64, 8
HeldOut = list[tuple[Batch, FlowDraws]]

STYLE = """\
svg { background: #fcfcfa }
text { font: 13px system-ui, sans-serif; fill: #62686f }
.mid { text-anchor: middle } .end { text-anchor: end }
.rule { stroke: #e3e3de } .base { stroke: #62686f } circle { fill: transparent }
polyline, line { fill: none; stroke-width: 2 } polyline.raw { stroke-width: 1; opacity: .25 }
.line-0 { stroke: #0b6b72 } .line-1 { stroke: #1d2023 } .line-2 { stroke: #62686f; stroke-dasharray: 5 4 }"""


def held_out_batches(run: Run, count: int) -> HeldOut:
    """Batches with their noise, times and dropped captions, from a series that the run does not train on.

    Of a folder's pictures there is no other series: they come in another order and with other noise.
    """
    recipe, settings = run.recipe, run.recipe.adapt
    source = open_source(replace(recipe.data, seed=recipe.data.seed + 1))
    size = settings.batch_size
    batches = []
    for i in range(count):
        batch = encode(source.samples(batch_positions(i, size)), run.inputs.family)
        shape = tuple(batch.latent.shape[1:])
        draws = draw_flow(recipe.seed + 1, i, size, shape, settings.shift, settings.caption_dropout)
        batches.append((batch, to_device(draws, run.engine.device)))
    return batches


@torch.no_grad()
def held_out_loss(view: TrigFlowView, held_out: HeldOut, run: Run) -> float:
    """Mean flow loss over the batches, in evaluation mode; the mode is put back."""
    training = view.training
    view.eval()
    with run.engine.autocast():
        losses = [flow_loss(view, batch, draws, run.inputs.null).float() for batch, draws in held_out]
    view.train(training)
    return torch.stack(losses).mean().item()


def train(stage: AdaptStage, run: Run, label: str) -> list[float]:
    """The stage from its first step to its last.  -> training loss of every step"""

    def make_batch(step: int) -> Batch:
        return encode(run.inputs.source.samples(batch_positions(step, stage.batch_size)), run.inputs.family)

    losses = []
    with (
        closing(prefetch(make_batch, 0, stage.steps)) as batches,
        tqdm(total=stage.steps, desc=f"{label:10}", unit="step") as bar,
    ):
        for step, batch in enumerate(batches):
            losses.append(stage.update(step, batch).read(run.engine)["loss"])
            bar.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
            bar.update()
    return losses


def compare(recipe: Recipe, held_out_count: int = HELD_OUT_BATCHES) -> dict:
    """Both starts of stage 1 with the recipe's steps, batch size and optimizer.  -> losses as plain data

    Raises SprintError as a run does.
    """
    teacher, time_scale = load_teacher(resolve(recipe.teacher))
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            start.value: Run(with_start(recipe, start), Path(folder) / start.value)
            for start in (AdaptStart.calibrated, AdaptStart.ones)
        }
        first = next(iter(runs.values()))
        held_out = held_out_batches(first, held_out_count)
        view = TrigFlowView(teacher.to(first.engine.device), time_scale)
        return {
            "teacher": held_out_loss(view, held_out, first),
            "starts": {name: one_start(run, teacher, time_scale, held_out) for name, run in runs.items()},
        }


def with_start(recipe: Recipe, start: AdaptStart) -> Recipe:
    return replace(recipe, adapt=replace(recipe.adapt, start=start))


def one_start(run: Run, teacher: SanaTransformer2DModel, time_scale: float, held_out: HeldOut) -> dict:
    """Held-out loss before and after training, and the training loss between."""
    network = start_of_adaptation(run.inputs, teacher, time_scale)
    stage = AdaptStage(run.recipe, run.engine, network, run.inputs.null)
    view = TrigFlowView(stage.network, DENSE_TIME)
    before = held_out_loss(view, held_out, run)
    began = time.monotonic()
    losses = train(stage, run, run.recipe.adapt.start.value)
    seconds = round(time.monotonic() - began, 1)
    return {
        "held_out_before": before,
        "held_out_after": held_out_loss(view, held_out, run),
        "training_losses": [round(loss, 6) for loss in losses],
        "training_seconds": seconds,
    }


def chart(record: dict) -> str:
    """The training losses over steps and the teacher's held-out loss, as an SVG file with its own style."""
    lines: dict[str, list[Point]] = {
        f"{name} start": list(enumerate(start["training_losses"], start=1))
        for name, start in record["starts"].items()
    }
    steps = max(map(len, lines.values()))
    lines["teacher, held-out"] = [(1, record["teacher"]), (steps, record["teacher"])]
    keys = "".join(
        f'<line class="line-{n}" x1="{58 + 145 * n}" x2="{82 + 145 * n}" y1="16" y2="16"/>'
        f'<text x="{90 + 145 * n}" y="20">{escape(name)}</text>'
        for n, name in enumerate(lines)
    )
    drawing = line_chart(lines, "step", "flow loss", log_y=True)
    drawing = drawing.replace("<svg ", '<svg y="32" height="280" ', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 520 316" width="780">'
        f"<style>{STYLE}</style>{keys}{drawing}</svg>\n"
    )


def table(record: dict) -> str:
    """The held-out losses for the terminal."""
    lines = ["held-out flow loss    before     after", f"teacher         {record['teacher']:12.4f}"]
    for name, start in record["starts"].items():
        lines.append(f"{name:16}{start['held_out_before']:12.4f}{start['held_out_after']:10.4f}")
    return "\n".join(lines)


def count(text: str) -> int:
    """A command-line number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", nargs="?", default=str(ROOT / "recipes" / "tiny.yaml"), help="default recipes/tiny.yaml"
    )
    parser.add_argument("--steps", type=count, default=STEPS, help=f"of each start (default {STEPS})")
    parser.add_argument("--batch-size", type=count, default=BATCH_SIZE, help=f"default {BATCH_SIZE}")
    parser.add_argument(
        "--held-out", type=count, default=HELD_OUT_BATCHES, help=f"batches (default {HELD_OUT_BATCHES})"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "tools" / "results", help="folder (default tools/results)"
    )
    args = parser.parse_args(argv)
    try:
        recipe = load_recipe(
            args.recipe, [f"adapt.steps={args.steps}", f"adapt.batch_size={args.batch_size}"]
        )
        losses = compare(recipe, args.held_out)
    except SprintError as error:
        print(f"compare_starts: {error}", file=sys.stderr)
        return 2
    record = {
        "command": command(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "recipe": recipe.name,
        "seed": recipe.seed,
        "steps": recipe.adapt.steps,
        "batch_size": recipe.adapt.batch_size,
        "held_out_batches": args.held_out,
        **losses,
    }
    print(table(record))
    print(write_whole(args.out / "compare_starts.json", json.dumps(record, indent=1) + "\n"))
    print(write_whole(args.out / "compare_starts.svg", chart(record)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
