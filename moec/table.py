"""Plain text tables: aligned columns that read well in a terminal, a log file and a bug report."""

from __future__ import annotations

from collections.abc import Sequence


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    """Rows under headers, two spaces apart; columns named in right are aligned to the right."""
    if not rows:
        return ""
    widths = [max(len(line[i]) for line in (headers, *rows)) for i in range(len(headers))]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join(_line(line, widths, [header in right for header in headers]) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    aligned = (
        cell.rjust(width) if flush else cell.ljust(width)
        for cell, width, flush in zip(cells, widths, right, strict=True)
    )
    return "  ".join(aligned).rstrip()


def number(value: float | None, digits: int = 2) -> str:
    """A figure for a table: 1.3e-07, 0.42, 12.3, 1532; "-" for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if abs(value) < 10**-digits:
        return f"{value:.1e}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.{digits}f}" if abs(value) < 10 else f"{value:.1f}"


def size(nbytes: int | None) -> str:
    """Bytes in the unit that reads best: 512 B, 1.5 MiB; "-" for None."""
    if nbytes is None:
        return "-"
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def milliseconds(value: float | None) -> str:
    """A time for a table, three significant digits: 0.123, 4.56, 78.9, 1234; "-" for None."""
    if value is None:
        return "-"
    if value < 1:
        return f"{value:.3f}"
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
