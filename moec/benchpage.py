"""A benchmark as one HTML page with plots (inline SVG): no script, no file beside it, readable without a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from moec.benchresult import BenchResult, Row, Timing
from moec.report import Report

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 64, 14, 40

STYLE = """
:root { --paper: #fff; --ink: #1b1f24; --soft: #5b6470; --rule: #e3e6ea; --before: #8a93a0; --after: #0b62c4; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e8eaed; --soft: #9aa3ae; --rule: #2b3138; --before: #8a93a0; --after: #5aa9ff; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 1180px; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
p, figcaption, li { color: var(--soft); } .plots { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); margin: 1.5rem 0; }
figure { margin: 0; } svg { width: 100%; height: auto; } text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--rule); } .line { fill: none; stroke-width: 2; } .band { opacity: .18; }
.before { stroke: var(--before); } .after { stroke: var(--after); }
.band.before, .dot.before { fill: var(--before); stroke: none; } .band.after, .dot.after { fill: var(--after);
  stroke: none; } text.before { fill: var(--before); stroke: none; } text.after { fill: var(--after); stroke: none; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { border-bottom: 1px solid var(--rule); padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
"""


def page(result: BenchResult, report: Report) -> str:
    """The whole page as text."""
    groups: dict[str, list[Row]] = {}
    for row in result.rows:
        groups.setdefault(row.name, []).append(row)
    title = f"moec bench: {result.settings.get('model', 'a model')}"
    settings = ", ".join(f"{name} {value}" for name, value in result.settings.items())
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    facts = "".join(f"<p>{escape(line)}</p>" for line in (settings, result.machine, versions) if line)
    left = [f"{layer.name} was left alone: {layer.reason}" for layer in report.layers if not layer.compiled]
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*result.notes, *left))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>"
        f"<p>{len(report.compiled)} of {len(report.layers)} layers compiled. Medians of interleaved runs; "
        "bands and brackets span the 10th to the 90th percentile.</p>"
        f'<div class="plots">{"".join(_figure(rows) for rows in groups.values())}</div>'
        f'<div class="scroll">{_table(result.rows)}</div>'
        f"{f'<ul>{notes}</ul>' if notes else ''}{facts}</body></html>\n"
    )


def _figure(rows: Sequence[Row]) -> str:
    speedups = [row.speedup for row in rows]
    caption = f"{min(speedups):.2f}x to {max(speedups):.2f}x as fast"
    return f"<figure><h2>{escape(rows[0].title)}</h2>{plot(rows)}<figcaption>{caption}</figcaption></figure>"


def plot(rows: Sequence[Row]) -> str:
    """Latency over tokens, both axes logarithmic: two lines with bands, a dot for each median."""
    ordered = sorted(rows, key=lambda row: row.tokens)
    every = [value for row in ordered for side in (row.before, row.after) for value in (side.p10_ms, side.p90_ms)]
    low, high = min(every) / 1.15, max(every) * 1.15
    x = _scale(ordered[0].tokens, ordered[-1].tokens, LEFT, WIDTH - RIGHT)
    y = _scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_grid(low, high, y)]
    for row in ordered:
        parts.append(
            f'<text x="{x(row.tokens):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{row.tokens}</text>'
        )
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">tokens</text>')
    ends = _apart(y(ordered[-1].before.median_ms), y(ordered[-1].after.median_ms))
    for name, end in zip(("before", "after"), ends, strict=True):
        points = [(row.tokens, row.before if name == "before" else row.after) for row in ordered]
        parts.append(_series(name, points, x, y))
        parts.append(f'<text class="{name}" x="{x(ordered[-1].tokens) + 10:.1f}" y="{end + 4:.1f}">{name}</text>')
    label = f"latency of {ordered[0].title} over tokens, before and after"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _series(
    name: str, points: Sequence[tuple[int, Timing]], x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    upper = [f"{x(tokens):.1f},{y(timing.p90_ms):.1f}" for tokens, timing in points]
    lower = [f"{x(tokens):.1f},{y(timing.p10_ms):.1f}" for tokens, timing in points]
    middle = [f"{x(tokens):.1f},{y(timing.median_ms):.1f}" for tokens, timing in points]
    dots = "".join(
        f'<circle class="dot {name}" cx="{x(tokens):.1f}" cy="{y(timing.median_ms):.1f}" r="4">'
        f"<title>{name}, T={tokens}: {timing} ms</title></circle>"
        for tokens, timing in points
    )
    band = f'<polygon class="band {name}" points="{" ".join(upper + lower[::-1])}"/>'
    return f'{band}<polyline class="line {name}" points="{" ".join(middle)}"/>{dots}'


def _grid(low: float, high: float, y: Callable[[float], float]) -> str:
    parts = []
    for tick in ticks(low, high):
        at = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g} ms</text>')
    return "".join(parts)


def ticks(low: float, high: float) -> list[float]:
    """Values within low..high: 1, 2 and 5 times powers of ten, or powers of ten alone; both ends if too few are."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    inside = [tick for tick in fine if low <= tick <= high]
    coarse = [tick for tick in inside if f"{tick:e}".startswith("1")]
    if len(inside) < 2:
        return [float(f"{low:.2g}"), float(f"{high:.2g}")]
    return coarse if len(inside) > 8 else inside


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """A logarithmic axis; the middle for everything if there is one value only."""
    span = math.log(high / low)
    if span == 0:
        return lambda value: (start + end) / 2
    return lambda value: start + (end - start) * math.log(value / low) / span


def _apart(first: float, second: float, gap: float = 14) -> tuple[float, float]:
    """Two label heights moved so far apart that they do not overlap."""
    missing = gap - abs(first - second)
    if missing <= 0:
        return first, second
    sign = 1 if first >= second else -1
    return first + sign * missing / 2, second - sign * missing / 2


def _table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("layer", "tokens", "before ms", "after ms", "faster", "runs"))
    body = "".join(
        f"<tr><td>{escape(row.title)}</td><td>{row.tokens}</td><td>{row.before}</td><td>{row.after}</td>"
        f"<td>{row.speedup:.2f}x</td><td>{row.before.runs}</td></tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
