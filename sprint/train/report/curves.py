"""What the page draws of a metrics.jsonl: the curves of the training, and where an update's time went."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from sprint.base.clock import OTHER
from sprint.pages.chart import Point
from sprint.train.log import TIME

IN_ORDER = (
    *("data", "encode", "teacher", "student", "fake score", "features", "heads", "forward", "backward"),
    "optimizer",
)
UPDATES = {  # by phase
    "flow": "Stage 1",
    "G": "Stage 2, student",
    "D": "Stage 2, discriminator",
    "F": "Stage 2, fake score",
}


@dataclass(frozen=True)
class Curve:
    """A chart: named lines of (x, y)."""

    title: str
    lines: Mapping[str, Sequence[Point]]
    x_label: str = "step"
    y_label: str = "loss"
    log_y: bool = False
    note: str = ""


def training_curves(rows: Sequence[dict]) -> list[Curve]:
    """The charts of a metrics.jsonl (`sprint.train.log.read_metrics`); a metric that is not there draws nothing.

    Names read: loss, grad_norm in every phase; loss_scm, loss_end, loss_adv, loss_self, loss_dmd, tangent_norm,
    logvar in phase G; loss_r1, loss_r2 in phase D.
    """
    trained = {"student": "G", "discriminator": "D", "fake score": "F"}
    drawn = [
        Curve("Stage 1: flow loss", {"loss": _line(rows, "flow", "loss")}),
        Curve(
            "Stage 1: gradient norm", {"norm": _line(rows, "flow", "grad_norm")}, y_label="norm", log_y=True
        ),
        Curve("Stage 2: consistency loss (sCM)", {"sCM": _line(rows, "G", "loss_scm")}),
        Curve(
            "Stage 2: regression onto the teacher's end points",
            {"distance": _line(rows, "G", "loss_end")},
            note="Mean square distance of latents, over the states of its trajectories.",
        ),
        Curve(
            "Stage 2: adversarial losses",
            {"student": _line(rows, "G", "loss_adv"), "discriminator": _line(rows, "D", "loss")},
        ),
        Curve(
            "Stage 2: penalties of the discriminator",
            {"R1": _line(rows, "D", "loss_r1"), "R2": _line(rows, "D", "loss_r2")},
            note="Mean square difference of logits under a little noise, before their weights.",
        ),
        Curve(
            "Stage 2: distribution matching",
            {"student": _line(rows, "G", "loss_dmd"), "fake score": _line(rows, "F", "loss")},
            note="Of the student, the mean square of the normalised difference of two scores.",
        ),
        Curve(
            "Stage 2: self-consistency",
            {"distance": _line(rows, "G", "loss_self")},
            note="Mean square distance of latents: one step, and a second one with the same noise.",
        ),
        Curve(
            "Stage 2: gradient norms",
            {name: _line(rows, phase, "grad_norm") for name, phase in trained.items()},
            y_label="norm",
            log_y=True,
        ),
        Curve(
            "Stage 2: tangent norm",
            {"norm": _line(rows, "G", "tangent_norm")},
            y_label="norm",
            log_y=True,
            note="Of F′ = cos t · sin t · dF/dt.",
        ),
        Curve("Stage 2: log-variance weight", {"logvar": _line(rows, "G", "logvar")}, y_label="logvar"),
    ]
    return [c for c in map(_without_empty_lines, drawn) if c.lines]


def update_times(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Milliseconds by part of each kind of update: medians over its rows, in the order of `in_order`."""
    times = {}
    for phase, title in UPDATES.items():
        logged = [row for row in rows if row["phase"] == phase and any(name.startswith(TIME) for name in row)]
        names = [name for row in logged for name in row if name.startswith(TIME)]
        if names:
            times[title] = {
                part: median(row.get(TIME + part, 0.0) for row in logged)
                for part in in_order(name.removeprefix(TIME) for name in names)
            }
    return times


def in_order(parts: Iterable[str]) -> list[str]:
    """Each once: the known ones in the order of an update, then the rest, "other" last."""
    given = dict.fromkeys(parts)
    known = [part for part in IN_ORDER if part in given]
    return [*known, *(p for p in given if p not in (*IN_ORDER, OTHER)), *([OTHER] if OTHER in given else [])]


def _line(rows: Sequence[dict], phase: str, metric: str) -> list[Point]:
    return [(r["step"], r[metric]) for r in rows if r["phase"] == phase and r.get(metric) is not None]


def _without_empty_lines(curve: Curve) -> Curve:
    return dataclasses.replace(curve, lines={name: line for name, line in curve.lines.items() if line})
