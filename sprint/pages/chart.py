"""Small line charts as inline SVG: no script, no network, one accent colour (the page's CSS paints them)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from types import MappingProxyType

Point = tuple[float, float]

WIDTH, HEIGHT = 520, 280  # of the viewBox
LEFT, RIGHT, TOP, BOTTOM = 76, 506, 12, 236  # the frame that data fill
MEDIAN_SHARE = 1 / 25  # of a line's points on either side of each running median
LEAST_REACH = 2  # and at least so many
FEW_POINTS = 2 * LEAST_REACH + 1  # lines with no more are drawn as they are
DASH = 4  # pixels on either side of a point that is alone
MARKS = 120  # points of a line, at most, that tell their value


@dataclass(frozen=True)
class Scale:
    """Numbers from `low` to `high` onto pixels from `start` to `stop`, evenly or by their logarithm."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round numbers inside the range: 1, 2, 5 × 10ⁿ steps, or the powers of ten of a wide log axis."""
        if self.log:
            exponents = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            if len(exponents) >= 2:
                return [10.0**n for n in exponents]
        rough = (self.high - self.low) / 4
        unit = 10 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(n * step, 12) for n in range(first, last + 1)]


def running_median(points: Sequence[Point]) -> list[Point]:
    """Each y replaced by the median of its neighbours (centred, shrinking at the ends); few points stay."""
    if len(points) <= FEW_POINTS:
        return list(points)
    reach = max(LEAST_REACH, round(len(points) * MEDIAN_SHARE))
    smooth = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        smooth.append((x, median(y for _, y in points[i - near : i + near + 1])))
    return smooth


def line_chart(
    lines: Mapping[str, Sequence[Point]],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    log_x: bool = False,
    around: Mapping[str, Sequence[Sequence[Point]]] = MappingProxyType({}),
) -> str:
    """An <svg> of named lines of (x, y).

    Long lines are drawn twice: every point pale, the running median dark. The axes fit the median, so a lone
    pale spike may leave the frame. On a log axis, points at or below zero are left out.

    around   by a line's name, paler lines that belong to it, of single runs say; the axes do not fit them
    """
    raw = {name: [p for p in line if _drawable(p, log_x, log_y)] for name, line in lines.items()}
    raw = {name: line for name, line in raw.items() if line}
    if not raw:
        raise ValueError("a chart needs at least one point")
    smooth = {name: running_median(line) for name, line in raw.items()}
    points = [p for line in smooth.values() for p in line]
    x = Scale(*_spread(min(p[0] for p in points), max(p[0] for p in points)), LEFT, RIGHT, log_x)
    y = _vertical([p[1] for p in points], log_y)
    drawn = [
        _path(raw[name], x, y, f"raw line-{n}") for n, name in enumerate(raw) if raw[name] != smooth[name]
    ]
    for n, name in enumerate(raw):
        paler = ([p for p in line if _drawable(p, log_x, log_y)] for line in around.get(name, ()))
        drawn += [_path(line, x, y, f"raw line-{n}") for line in paler if line]
    drawn += [_path(smooth[name], x, y, f"smooth line-{n}") for n, name in enumerate(raw)]
    drawn += [_marks(name, smooth[name], x, y) for name in raw]
    label = escape(f"{y_label} by {x_label}: {', '.join(raw)}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{_grid(x, y, x_label, y_label)}{_frame(''.join(drawn))}</svg>"
    )


def _drawable(point: Point, log_x: bool, log_y: bool) -> bool:
    return (point[0] > 0 or not log_x) and (point[1] > 0 or not log_y)


def short_number(value: float) -> str:
    """1500 -> "1.5k", 0.00002 -> "2e-05", 0.25 -> "0.25"."""
    if abs(value) >= 1000:
        return f"{value / 1000:g}k"
    return f"{value:g}".replace("-", "−", 1) if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}"


def _spread(low: float, high: float) -> tuple[float, float]:
    """A range that is never empty."""
    return (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def _vertical(values: list[float], log: bool) -> Scale:
    """The y axis: upwards, with a little air above and below."""
    low, high = _spread(min(values), max(values))
    if log:
        air = (high / low) ** 0.06
        return Scale(low / air, high * air, BOTTOM, TOP, log=True)
    air = 0.06 * (high - low)
    return Scale(low - air, high + air, BOTTOM, TOP)


def _frame(body: str) -> str:
    """An inner <svg> on the same coordinates, which clips what leaves the frame."""
    box = f"{LEFT} {TOP} {RIGHT - LEFT} {BOTTOM - TOP}"
    x, y, width, height = box.split()
    return f'<svg x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{box}">{body}</svg>'


def _path(points: Sequence[Point], x: Scale, y: Scale, css: str) -> str:
    places = [(x(a), y(b)) for a, b in points]
    if len(places) == 1:  # a dash, which is seen
        places = [(places[0][0] + shift, places[0][1]) for shift in (-DASH, DASH)]
    corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    return f'<polyline class="{css}" points="{corners}"/>'


def _marks(name: str, points: Sequence[Point], x: Scale, y: Scale) -> str:
    """Unseen dots that show their value under the pointer."""
    every = math.ceil(len(points) / MARKS)
    return "".join(
        f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="6">'
        f"<title>{escape(name)}: {b:.4g} at {a:g}</title></circle>"
        for a, b in points[::every]
    )


def _grid(x: Scale, y: Scale, x_label: str, y_label: str) -> str:
    rules = "".join(f'<path class="rule" d="M{LEFT},{y(v):.1f}H{RIGHT}"/>' for v in y.ticks())
    left = "".join(
        f'<text class="tick end" x="{LEFT - 8}" y="{y(v) + 4:.1f}">{short_number(v)}</text>'
        for v in y.ticks()
    )
    below = "".join(
        f'<text class="tick mid" x="{x(v):.1f}" y="{BOTTOM + 18}">{short_number(v)}</text>' for v in x.ticks()
    )
    middle = (TOP + BOTTOM) / 2
    names = (
        f'<text class="axis mid" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 6}">{escape(x_label)}</text>'
        f'<text class="axis mid" transform="translate(11 {middle}) rotate(-90)">{escape(y_label)}</text>'
    )
    return f'{rules}<path class="base" d="M{LEFT},{BOTTOM}H{RIGHT}"/>{left}{below}{names}'
