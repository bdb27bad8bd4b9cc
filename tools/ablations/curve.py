"""One-step score and FID against what training cost: the picture of the methods, and its table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from sprint.pages.chart import Point, line_chart
from tools.ablations.answers import Answer, Line
from tools.ablations.rows import BETTER, NAMES, WITHIN_NOISE, WORSE, Measured

MEASURES = ("score", "fid")
COST = "thread-seconds of training"
# Told apart with the commonest colour blindness too (Okabe and Ito), and again dashed
COLOURS = ("#1d2023", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
KEYS_IN_A_ROW, KEY_WIDTH, KEY_HEIGHT, PANEL = 3, 170, 20, 290


@dataclass(frozen=True)
class Moment:
    """A row after a share of its updates: by seed what training had cost, in seconds of a thread, and both measures."""

    share: float
    cost: Measured
    score: Measured
    fid: Measured

    def point(self, measure: str) -> Point:
        """Means over seeds."""
        return self.cost.mean, getattr(self, measure).mean

    def of_seed(self, measure: str, seed: int) -> Point:
        return self.cost.values[seed], getattr(self, measure).values[seed]


def moments(line: Line) -> list[Moment]:
    """From the first to the end, of whatever runs have got there; none without runs that have scores at 1 step."""
    runs = {
        seed: [*found.get("points", ()), found["scores"]["1"] | found["training"]]
        for seed, found in enumerate(line.results)
        if found and "1" in found["scores"] and found.get("training")
    }
    shares = (*line.row.points, 1.0)
    whole = {seed: at for seed, at in runs.items() if len(at) == len(shares)}
    if not whole:
        return []
    return [
        Moment(share, *(_measured(whole, n, key) for key in ("thread_seconds", *MEASURES)))
        for n, share in enumerate(shares)
    ]


def _measured(runs: Mapping[int, Sequence[dict]], n: int, key: str) -> Measured:
    values = {seed: at[n][key] for seed, at in runs.items()}
    return Measured(values, {seed: at[n].get(f"{key}_error", 0.0) for seed, at in runs.items()})


# ---- the picture ------------------------------------------------------------------------------------


def drawing(answer: Answer) -> str:
    """Score above FID over thread-seconds, a line for a row, its seeds paler, as an SVG file; "" without runs."""
    rows = {line.row.label: found for line in answer.lines if (found := moments(line))}
    if not rows:
        return ""
    top = KEY_HEIGHT * -(-len(rows) // KEYS_IN_A_ROW) + 12
    panels = []
    for measure in MEASURES:
        lines = {name: [moment.point(measure) for moment in found] for name, found in rows.items()}
        around = {name: _seeds(found, measure) for name, found in rows.items()}
        title = f"{NAMES[measure]}, 1 step"
        panel = line_chart(lines, COST, title, log_y=measure == "fid", log_x=True, around=around)
        y = top + PANEL * len(panels)
        panels.append(panel.replace("<svg ", f'<svg y="{y}" height="280" ', 1))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="curve" viewBox="0 0 520 {top + PANEL * len(panels)}" '
        f'width="780"><style>{_style(len(rows))}</style>{_keys(list(rows))}{"".join(panels)}</svg>\n'
    )


def _seeds(found: Sequence[Moment], measure: str) -> list[list[Point]]:
    seeds = found[0].cost.values
    return [[moment.of_seed(measure, seed) for moment in found] for seed in seeds] if len(seeds) > 1 else []


def _keys(names: Sequence[str]) -> str:
    drawn = []
    for n, name in enumerate(names):
        x, y = 6 + KEY_WIDTH * (n % KEYS_IN_A_ROW), 14 + KEY_HEIGHT * (n // KEYS_IN_A_ROW)
        drawn.append(f'<line class="line-{n}" x1="{x}" x2="{x + 24}" y1="{y}" y2="{y}"/>')
        drawn.append(f'<text x="{x + 30}" y="{y + 4}">{escape(name)}</text>')
    return "".join(drawn)


def _style(count: int) -> str:
    """Of this drawing alone, wherever it stands."""
    rules = [
        ".curve { background: #fcfcfa }",
        ".curve text { font: 12px system-ui, sans-serif; fill: #62686f }",
        ".curve .mid { text-anchor: middle } .curve .end { text-anchor: end }",
        ".curve .rule { stroke: #e3e3de } .curve .base { stroke: #62686f } .curve circle { fill: transparent }",
        ".curve polyline, .curve line { fill: none; stroke-width: 2 }",
        ".curve polyline.raw { stroke-width: 1; opacity: .3 }",
    ]
    for n in range(count):
        again, colour = divmod(n, len(COLOURS))
        dashes = "6 4" if again else "none"
        rules.append(f".curve .line-{n} {{ stroke: {COLOURS[colour]}; stroke-dasharray: {dashes} }}")
    return "\n".join(rules)


# ---- in figures and words ---------------------------------------------------------------------------


def head(answer: Answer) -> list[tuple[str, str]]:
    shares = sorted({moment.share for line in answer.lines for moment in moments(line)})
    at = [f"{share:.0%} of the updates" for share in shares]
    titles = [(name, when) for when in at for name in ("thread-seconds", "score", "FID")]
    return [("at 1 step", ""), *titles]


def cells(line: Line) -> list[str]:
    """What stands behind a row's name, under `head`: means over seeds ± their spread."""
    found = []
    for moment in moments(line):
        found.append(f"{moment.cost.mean:.0f}")
        for measured, digits in ((moment.score, 3), (moment.fid, 1)):
            spread = f" ± {measured.spread:.{digits}f}" if measured.spread is not None else ""
            found.append(f"{measured.mean:.{digits}f}{spread}")
    return found


def as_rows(answer: Answer) -> list[tuple[str, list[str]]]:
    """Of `head`'s table, the rows that have runs."""
    return [(line.row.label, found) for line in answer.lines if (found := cells(line))]


def as_data(line: Line) -> list[dict]:
    """Every moment, seed by seed."""
    return [
        {"share": moment.share}
        | {"thread_seconds": moment.cost.values, "score": moment.score.values, "fid": moment.fid.values}
        for moment in moments(line)
    ]


def verdict_lines(answer: Answer) -> list[str]:
    """A sentence for each verdict that rows have, the noise among them: which rows, in which measure."""
    base, sentences = answer.base.row.label, []
    for word, verb in ((BETTER, "better than"), (WORSE, "worse than"), (WITHIN_NOISE, "within the noise of")):
        rows = []
        for line in answer.lines:
            measures = [NAMES[m] for m, said in answer.verdicts(line).items() if said == word]
            if measures:
                rows.append(f"{line.row.label} ({' and '.join(measures)})")
        if rows:
            sentences.append(f"At the end of training {verb} {base} at 1 step: {', '.join(rows)}.")
    return sentences


def cheapest(answer: Answer) -> str:
    """After what training each row was first seen as high as the base ends; "" where the base has no runs."""
    ends = moments(answer.base)
    if not ends:
        return ""
    goal, cost = ends[-1].score.mean, ends[-1].cost.mean
    said = []
    for line in answer.lines:
        first = next((m for m in moments(line) if m.score.mean >= goal), None)
        if first and not line.row.is_base:
            said.append(f"{line.row.label} by {first.cost.mean:.0f}")
    end = f"{answer.base.row.label} ends at a score of {goal:.3f} after {cost:.0f} thread-seconds"
    return f"{end}; as high were: {', '.join(said) or 'none'}."


def mean_cost(line: Line) -> float | None:
    """Thread-seconds of training, stage 1 among them, over the runs that tell it."""
    told = [found["training"]["thread_seconds"] for found in line.results if found and found.get("training")]
    return fmean(told) if told else None
