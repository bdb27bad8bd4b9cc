"""What is added to the paper's recipe, one by one and together, and the whole list of `make ablations`.

The base is recipes/tiny-paper.yaml. Rows have more or fewer updates by a rough guess of what one costs; the picture is
drawn over the seconds that each did take. What is compared: score and FID at 1 step.
"""

from collections.abc import Sequence
from functools import cache

from sprint.base.door import read_json
from sprint.base.names import BUILT_IN
from tools.ablations.rows import ADVERSARIAL, BASE_SEEDS, PAPER_GROUPS, WEIGHT, Group, Row

PAPER, OURS = "tiny-paper", "tiny"  # recipes
CURVE = "curve"
SEEDS = 3
POINTS = (0.25, 0.5)  # shares of the updates at which the student is scored, beside the end
# of the teacher at 20 steps, by score; one that has its own in training.json says so there
MEASURED_GUIDANCE = 2.0
AROUND = 0.5  # scales below and above the best that a student learns too

AVERAGE = ("distill.ema_decay=0.98",)
# the end of a trajectory in place of sCM and LADD: 8 states, all of them, serve as 8 samples
TRAJECTORIES = (
    *("distill.trajectories.states=8", "distill.trajectories.steps=8", "distill.regression=1"),
    *("distill.consistency.weight=0", f"{WEIGHT}=0"),
)
RELATIVISTIC = (f"{ADVERSARIAL}.loss=relativistic", f"{ADVERSARIAL}.r1=0.1")
MATCHING = tuple(
    f"distill.matching.{setting}"
    for setting in (
        *("updates=2", "optimizer.kind=adamw", "optimizer.lr=1e-4", "optimizer.betas=[0.9, 0.99]"),
        "optimizer.clip_norm=1e9",
    )
)


@cache
def best_guidance() -> float:
    """Of the built-in teacher, as `make teacher` measured it."""
    scores = read_json(BUILT_IN["tiny"] / "training.json").get("scores", {})
    return float(scores.get("best_guidance", MEASURED_GUIDANCE))


def depth() -> tuple[str, ...]:
    """Twice the built-in teacher's blocks."""
    blocks = read_json(BUILT_IN["tiny"] / "transformer" / "config.json")["num_layers"]
    return (f"distill.depth={2 * blocks}",)


def guidance() -> tuple[str, ...]:
    """Scales around the teacher's best, and pictures drawn with that one."""
    best = best_guidance()
    scales = sorted({max(1.0, best + shift) for shift in (-AROUND, 0.0, AROUND)})
    return (f"distill.guidance_scales={scales}", f"evaluate.guidance_scale={best}")


def _row(label: str, overrides: tuple[str, ...] = (), note: str = "", **more) -> Row:
    return Row(label, overrides, SEEDS, recipe=PAPER, points=POINTS, note=note, **more)


def _together(label: str, sharpening: tuple[str, ...], note: str, **more) -> Row:
    overrides = (*AVERAGE, *depth(), *guidance(), *TRAJECTORIES, *sharpening)
    return _row(label, overrides, f"average, depth, guidance and trajectories, {note}", **more)


METHODS = Group(
    CURVE,
    "The paper's recipe, and what is added to it",
    "",
    (
        _row("paper", note="recipes/tiny-paper.yaml"),
        _row("+ average", AVERAGE, "drawn with averaged weights, decay .98"),
        _row("+ depth", depth(), "twice as many blocks as the teacher", updates=0.7),
        _row("+ guidance", guidance(), f"around the teacher's best, {best_guidance():g}, in place of 4.5"),
        _row(
            "+ trajectories",
            TRAJECTORIES,
            "regression onto the end of the teacher's trajectory, in place of sCM and LADD",
            updates=1.5,
        ),
        _row(
            "+ relativistic LADD",
            RELATIVISTIC,
            "logits compared in pairs, R1 by a little noise, its term off for the first quarter",
            warmup=0.25,
        ),
        _row(
            "+ matching",
            ("distill.matching.weight=0.01", *MATCHING),
            "distribution matching beside sCM and LADD, with rCM's weight",
            updates=1.2,
        ),
        _together("together", (), "no sharpening", updates=0.8),
        _together(
            "together, LADD",
            (f"{WEIGHT}=0.5", *RELATIVISTIC),
            "then relativistic LADD in the second half",
            updates=0.7,
            warmup=0.5,
        ),
        _together(
            "together, matching",
            ("distill.matching.weight=0.1", *MATCHING),
            "beside distribution matching",
            updates=0.8,
        ),
        Row("tiny", (), SEEDS, recipe=OURS, points=POINTS, note="recipes/tiny.yaml as it is"),
    ),
    steps="1",
    ours=True,
)


def _at_rate(label: str, rate: str) -> Row:
    overrides = (f"distill.optimizer.lr={rate}", f"{ADVERSARIAL}.optimizer.lr={rate}")
    return Row(label, overrides, recipe=PAPER, points=POINTS)


RATES = Group(
    "rate",
    "Learning rate of the paper's recipe",
    "",
    (
        _at_rate("a third", "3e-5"),
        _row("paper", note="1e-4"),
        _at_rate("three times", "3e-4"),
    ),
    steps="1",
    ours=True,
)

GROUPS = (METHODS, RATES, *PAPER_GROUPS)
MOST_SEEDS = max(BASE_SEEDS, SEEDS)


def chosen(keys: Sequence[str]) -> tuple[Group, ...]:
    """The groups of these keys, in their own order; all without keys."""
    return tuple(group for group in GROUPS if not keys or group.key in keys)
