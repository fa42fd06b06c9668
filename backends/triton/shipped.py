"""Plans that were measured, shipped as data in tuned/: the nearest one to a shape, if one is near.

E experts, K experts per token, D model width, F expert width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import Any

NEAR = 2.0
"""Sum of the octaves between two shapes up to which a measured plan is better than a reckoned one."""


@dataclass(frozen=True, slots=True)
class Point:
    """What tiles depend on. Experts count for little: their number only changes how often tiles come."""

    gated: bool
    rows: float
    """Rows of a hit expert."""
    hit: float
    """Experts that are hit."""
    d: int
    f: int

    def octaves_to(self, other: Point) -> float:
        """How far apart two shapes are; infinite if one is gated and the other is not."""
        if self.gated != other.gated:
            return float("inf")
        widths = abs(log2(self.d / other.d)) + abs(log2(self.f / other.f))
        return abs(log2(self.rows / other.rows)) + 0.5 * widths + 0.25 * abs(log2(self.hit / other.hit))


@dataclass(frozen=True, slots=True)
class Measured:
    """One measured plan: the path and its numbers, as choose.py names them."""

    point: Point
    path: str
    first: tuple[int, ...]
    second: tuple[int, ...]


@lru_cache
def measured(capability: tuple[int, int], itemsize: int) -> tuple[Measured, ...]:
    """All plans for GPUs of this compute capability and elements of this size."""
    found: list[Measured] = []
    for file in sorted((Path(__file__).parent / "tuned").glob("*.json")):
        table = json.loads(file.read_text())
        if tuple(table["capability"]) == capability and table["itemsize"] == itemsize:
            found += [_read(entry) for entry in table["plans"]]
    return tuple(found)


def _read(entry: dict[str, Any]) -> Measured:
    pairs = entry["tokens"] * entry["k"]
    hit = entry["experts"] * (1 - (1 - entry["k"] / entry["experts"]) ** entry["tokens"])
    point = Point(entry["gated"], pairs / hit, hit, entry["d"], entry["f"])
    return Measured(point, entry["path"], tuple(entry["first"]), tuple(entry["second"]))


def nearest(point: Point, paths: tuple[str, ...], capability: tuple[int, int], itemsize: int) -> Measured | None:
    """The measured plan of one of these paths that is nearest to a shape; None if none is near."""
    candidates = [plan for plan in measured(capability, itemsize) if plan.path in paths]
    if not candidates:
        return None
    best = min(candidates, key=lambda plan: point.octaves_to(plan.point))
    return best if point.octaves_to(best.point) <= NEAR else None
