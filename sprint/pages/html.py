"""How the report is set: pieces of HTML from plain values, every one of them escaped here.

A page is one file. Its style is inline, its pictures are data, its charts are SVG, and its security policy
forbids the browser to load anything else.
"""

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from sprint.pages.chart import Point, line_chart

NAMED_PART = 0.085  # share of the page's width from which a part of a bar has room for its name
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, sections: Sequence[str]) -> str:
    """A whole HTML document. Empty sections are left out."""
    style = (resources.files("sprint.pages") / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def masthead(kicker: str, title: str, lead: str) -> str:
    return (
        f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(lead)}</p></header>'
    )


def section(title: str, *parts: str) -> str:
    """A headed section; nothing at all if every part is empty."""
    body = "\n".join(filter(None, parts))
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def paragraph(text: str, css: str = "") -> str:
    return f'<p class="{css}">{escape(text)}</p>' if css else f"<p>{escape(text)}</p>"


def link(address: str, words: str) -> str:
    return f'<p><a href="{escape(address)}">{escape(words)}</a></p>'


def figures(items: Sequence[tuple[str, str, str]]) -> str:
    """A row of key figures: (number, what it is, beside what)."""
    cells = "".join(
        f"<div><dd>{escape(number)}</dd><dt>{escape(what)}</dt><dd class='aside'>{escape(beside)}</dd></div>"
        for number, what, beside in items
    )
    return f'<dl class="figures">{cells}</dl>' if items else ""


def table(
    head: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, Sequence[str]]],
    shares: Sequence[Sequence[float | None]] | None = None,
    marks: Sequence[str] | None = None,
) -> str:
    """A table of numbers; the first column of `head` and of each row names the row.

    head     two lines a column
    rows     (name, cells)
    shares   [rows][cells] of 0 to 1 or None: a thin bar under the number
    marks    a part of `stacks` for each row, or "": its colour before the name
    """
    marks = marks or [""] * len(rows)
    shares = shares or [[None] * len(cells) for _, cells in rows]
    top = "".join(f'<th scope="col">{escape(a)}<small>{escape(b)}</small></th>' for a, b in head)
    body = "".join(
        f'<tr><th scope="row">{_swatch(mark)}{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}{_bar(s)}</td>" for cell, s in zip(cells, bars, strict=True))
        + "</tr>"
        for (name, cells), bars, mark in zip(rows, shares, marks, strict=True)
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="numbers"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def checklist(rows: Sequence[tuple[str, str, str, bool]]) -> str:
    """(text, goal, value, met): each says in words whether it is met."""
    body = "".join(
        f'<tr class="{"met" if met else "short"}"><th scope="row">{escape(text)}</th>'
        f"<td>{escape(value)}</td><td>{escape(goal)}</td>"
        f"<td>{'met' if met else 'falls short'}</td></tr>"
        for text, goal, value, met in rows
    )
    head = "<tr><th>Goal</th><th>Measured</th><th>Wanted</th><th></th></tr>"
    return f'<table class="goals"><thead>{head}</thead><tbody>{body}</tbody></table>' if rows else ""


def shares(rows: Sequence[tuple[str, str, float]]) -> str:
    """(name, value as text, share of the whole 0 to 1), each with its bar."""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="wide">{_bar(share)}</td>'
        f"<td>{escape(value)}</td></tr>"
        for name, value, share in rows
    )
    return f'<table class="shares"><tbody>{body}</tbody></table>' if rows else ""


def stacks(rows: Sequence[tuple[str, str, Sequence[tuple[str, float]]]]) -> str:
    """Bars made of parts on one scale: (name, value as text, parts), a part being its name and its size.

    The colour is that of the CSS class part-NAME, which `table` repeats beside its rows.
    """
    longest = max((sum(size for _, size in parts) for _, _, parts in rows), default=0.0)
    drawn = []
    for name, value, parts in rows:
        cells = "".join(
            f'<span class="{_mark(part)}" style="width:{100 * size / longest:.2f}%" title="{escape(part)}">'
            f"{escape(part) if size >= NAMED_PART * longest else ''}</span>"
            for part, size in parts
        )
        drawn.append(f'<p>{escape(name)} <b>{escape(value)}</b></p><div class="stack">{cells}</div>')
    return f'<div class="stacks">{"".join(drawn)}</div>' if longest else ""


def chart(
    title: str,
    lines: Mapping[str, Sequence[Point]],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    note: str = "",
) -> str:
    """A titled chart with a key where there is more than one line."""
    keys = "".join(f'<span class="key line-{n}">{escape(name)}</span>' for n, name in enumerate(lines))
    key = f'<p class="keys">{keys}</p>' if len(lines) > 1 else ""
    below = f"<p class='aside'>{escape(note)}</p>" if note else ""
    drawing = line_chart(lines, x_label, y_label, log_y)
    return f"<figure><figcaption>{escape(title)}</figcaption>{key}{drawing}{below}</figure>"


def charts(drawings: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(drawings)}</div>' if drawings else ""


def listing(rows: Mapping[str, str]) -> str:
    cells = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items())
    return f'<dl class="listing">{cells}</dl>' if rows else ""


def code(text: str) -> str:
    return f"<pre><code>{escape(text.rstrip())}</code></pre>" if text.strip() else ""


# ---- numbers as text --------------------------------------------------------------------------------


def number(value: float | None, spec: str = ".2f", unit: str = "") -> str:
    return "–" if value is None else f"{value:{spec}}{unit}"


def steps(count: int) -> str:
    return f"{count} step{'s' if count != 1 else ''}"


def brief(seconds: float | None) -> str:
    """0.0104 -> "10 ms", 1.42 -> "1.4 s"."""
    if seconds is None:
        return "–"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"


def duration(seconds: float) -> str:
    """694 -> "11 min 34 s", 7300 -> "2 h 2 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def memory(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _bar(share: float | None) -> str:
    if share is None:
        return ""
    return f'<i class="bar"><b style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></b></i>'


def _swatch(part: str) -> str:
    return f'<i class="swatch {_mark(part)}"></i>' if part else ""


def _mark(part: str) -> str:
    """The CSS class of a part's colour."""
    return f"part-{escape(part.replace(' ', '-'))}"
