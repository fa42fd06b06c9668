"""Regions that differ from a usual layer in a line or two: the sites that passes must leave alone."""

from __future__ import annotations

from moec.ir import Region, parse
from moec.pipeline import run


def variant(region: Region, *changes: tuple[str, str]) -> Region:
    """The region with parts of its text replaced; each part must be there."""
    text = str(region)
    for old, new in changes:
        assert old in text, f"{old!r} is not in\n{text}"
        text = text.replace(old, new)
    return parse(text)


def skipped(region: Region, passes: str) -> list[str]:
    """What the last of the passes left alone, with its reasons."""
    return run(region, passes)[1][-1].skipped
