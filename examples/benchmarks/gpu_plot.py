"""Times over the floor as an SVG: one panel a layer, one line a contestant, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import log2

WIDTH, HEIGHT, LEFT, TOP = 360, 220, 44, 34
COLOURS = ("#0b6e4f", "#6bbf59", "#c1121f", "#e07a5f", "#1d4e89", "#6a4c93", "#5fa8d3", "#b08968", "#495057", "#adb5bd")
Row = tuple[str, int, float, Mapping[str, float | None]]
"""layer, tokens, floor, and each contestant's time."""


def plot(rows: Sequence[Row]) -> str:
    """The whole figure; lower is better, 1 is the floor."""
    layers = list(dict.fromkeys(row[0] for row in rows))
    names = list(dict.fromkeys(name for row in rows for name in row[3]))
    colours = dict(zip(names, COLOURS * (len(names) // len(COLOURS) + 1), strict=False))
    panels = [
        f'<g transform="translate({i % 3 * WIDTH},{i // 3 * HEIGHT})">'
        + _panel(layer, [row for row in rows if row[0] == layer], colours)
        + "</g>"
        for i, layer in enumerate(layers)
    ]
    bottom = (len(layers) + 2) // 3 * HEIGHT
    legend = "".join(
        f'<g transform="translate({20 + i % 5 * 210},{bottom + 20 + i // 5 * 18})">'
        f'<rect width="12" height="4" y="-5" fill="{colours[name]}"/><text x="18">{escape(name)}</text></g>'
        for i, name in enumerate(names)
    )
    size = f'width="{3 * WIDTH}" height="{bottom + 60}" viewBox="0 0 {3 * WIDTH} {bottom + 60}"'
    style = 'font-family="sans-serif" font-size="11"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(panels)}{legend}</svg>\n'


def _panel(layer: str, rows: Sequence[Row], colours: Mapping[str, str]) -> str:
    tokens = sorted({row[1] for row in rows})
    ratios = [time / row[2] for row in rows for time in row[3].values() if time]
    high = max(2.0, min(64.0, max(ratios, default=2.0)))
    low = min(0.75, min(ratios, default=0.75))

    def x(count: int) -> float:
        return LEFT + (WIDTH - LEFT - 16) * (tokens.index(count) / max(1, len(tokens) - 1))

    def y(ratio: float) -> float:
        share = (log2(min(max(ratio, low), high)) - log2(low)) / (log2(high) - log2(low))
        return HEIGHT - 30 - (HEIGHT - 30 - TOP) * share

    parts = [f'<text x="{LEFT}" y="20" font-weight="bold">{escape(layer)}, time over the floor</text>']
    ratio = 1.0
    while ratio <= high:
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 16}" y1="{y(ratio):.1f}" y2="{y(ratio):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(ratio) + 4:.1f}" text-anchor="end">{ratio:g}</text>')
        ratio *= 2
    parts += [f'<text x="{x(count):.1f}" y="{HEIGHT - 14}" text-anchor="middle">{count}</text>' for count in tokens]
    for name, colour in colours.items():
        at = [(x(row[1]), y(time / row[2])) for row in rows if (time := row[3].get(name))]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.2" fill="{colour}"/>' for a, b in at]
    return "".join(parts)
