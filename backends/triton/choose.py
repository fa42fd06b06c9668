"""Which path and which tiles a number of tokens gets: from the layer's shape and the GPU, without asking the device.

T tokens, K experts per token, P = T * K pairs, E experts, D model width, F expert width, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from moec.backends.triton.gpu import GpuFacts
from moec.backends.triton.shipped import Point, nearest

GEMV = "gemv"
TILES = "tiles"
PERSISTENT = "persistent"
SHARING = 1.15
"""Pairs per hit expert from which reading each expert once for all its rows always pays."""
GROUPING_BYTES = 18e6
"""What a GPU reads in the time that grouping and summing take, about 6 us."""


class Rows(NamedTuple):
    """Rows of weights times inputs that one program of the GEMV path holds at once."""

    rows: int
    inputs: int
    warps: int = 4


class Tile(NamedTuple):
    """One product's tiles: rows, outputs (of each of gate and up), inputs of a step."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group: int = 8
    """Tiles of rows that go through all outputs together."""
    flatten: bool = False
    """Whether the loops over tiles and steps become one, which loads the next tile's first steps ahead."""
    per_processor: int = 1
    """Persistent programs on each multiprocessor; one's epilogue then hides behind another's products."""


class Plan(NamedTuple):
    """How a number of tokens is run. `first` and `second` are the products' tiles, Rows for the GEMV path."""

    path: str
    first: Rows | Tile
    second: Rows | Tile
    origin: str = "cost model"

    def __str__(self) -> str:
        return f"{self.path} {_short(self.first)} then {_short(self.second)} ({self.origin})"


def _short(part: Rows | Tile) -> str:
    if isinstance(part, Rows):
        return f"{part.rows}x{part.inputs} w{part.warps}"
    more = f" g{part.group}" + " flat" * part.flatten + (f" x{part.per_processor}" if part.per_processor > 1 else "")
    return f"{part.bm}x{part.bn}x{part.bk} w{part.warps} s{part.stages}{more}"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a choice depends on about a layer."""

    experts: int
    d: int
    f: int
    o: int
    gated: bool
    dtype: torch.dtype
    weights: torch.dtype
    turned: tuple[bool, bool]
    """Whether a product's weights lie [C, N] in memory: the first, the second."""
    tma: bool
    """Whether the weights lie so that TMA can read them."""
    listed: bool = False
    """Whether a table says where each expert's weights lie."""


def expected_hit(tokens: int, k: int, experts: int) -> float:
    """How many experts are hit when each token draws k different ones evenly."""
    missed: float = (1.0 - min(k, experts) / experts) ** tokens
    return experts * (1.0 - missed)


def choose(shape: Shape, tokens: int, k: int, facts: GpuFacts) -> Plan:
    """The plan for T tokens with K experts each: a measured one if the shape is near one, else a reckoned one."""
    pairs = max(tokens * k, 1)
    hit = max(expected_hit(max(tokens, 1), k, shape.experts), 1.0)
    point = Point(shape.gated, pairs / hit, hit, shape.d, shape.f)
    if repeats_cost_less(shape, pairs, hit):
        return _rows_plan(shape, point, facts)
    tma = shape.tma and facts.hopper and shape.dtype.itemsize == 2 and shape.weights == shape.dtype
    found = None
    if shape.weights == shape.dtype:
        paths = (TILES, PERSISTENT) if tma else (TILES,)
        found = nearest(point, paths, facts.capability, shape.dtype.itemsize)
    if found is not None:
        return Plan(found.path, _tile(found.first), _tile(found.second), "shipped")
    if point.rows >= 24 and tma:
        return Plan(PERSISTENT, *_persistent_tiles(shape, point.rows))
    return Plan(TILES, *_small_tiles(shape, point.rows, facts))


def _tile(numbers: tuple[int, ...]) -> Tile:
    tile = Tile._make(numbers)
    return tile._replace(flatten=bool(tile.flatten))


def repeats_cost_less(shape: Shape, pairs: int, hit: float) -> bool:
    """Whether reading an expert again for each of its rows takes less time than grouping the rows would."""
    matrices = 3 if shape.gated else 2
    again = (pairs - hit) * matrices * shape.d * shape.f * shape.weights.itemsize
    return pairs / hit <= SHARING and again <= GROUPING_BYTES


def _rows_plan(shape: Shape, point: Point, facts: GpuFacts) -> Plan:
    found = nearest(point, (GEMV,), facts.capability, shape.weights.itemsize)
    if found is not None and not any(shape.turned):
        return Plan(GEMV, Rows(*found.first), Rows(*found.second), "shipped")
    return Plan(GEMV, _rows(shape, shape.turned[0]), _rows(shape, shape.turned[1]))


def _rows(shape: Shape, turned: bool) -> Rows:
    if turned:
        return Rows(64, 64)
    return Rows(4, 1024 * 2 // max(shape.weights.itemsize, 2))


def _persistent_tiles(shape: Shape, rows: float) -> tuple[Tile, Tile]:
    double = 1 if shape.gated else 2
    if rows < 48:
        return Tile(64, 64 * double, 128, 4, 3), Tile(64, 128, 128, 4, 4)
    return Tile(128, 128 * double, 64, 8, 3, 16), Tile(128, 256, 64, 8, 3, 16, flatten=True)


def _small_tiles(shape: Shape, rows: float, facts: GpuFacts) -> tuple[Tile, Tile]:
    """Deep steps for few rows, where weights stream; wider tiles for more, where they are used again."""
    double = 1 if shape.gated else 2
    size = shape.dtype.itemsize
    if rows <= 8:
        first, second = Tile(16, 32 * double, 512 // size, 4, 3), Tile(16, 64, 256 // size, 4, 4)
    elif rows <= 24:
        first, second = Tile(32, 64 * double, 256 // size, 4, 3), Tile(32, 128, 256 // size, 4, 3)
    elif size == 4:
        # Products of fp32 numbers run on the ordinary units, which need registers for both sides.
        first, second = Tile(64, 32 * double, 32, 4, 3), Tile(64, 64, 32, 4, 3)
    elif rows <= 96:
        first, second = Tile(64, 64 * double, 64, 4, 3), Tile(64, 128, 64, 4, 3)
    else:
        first, second = Tile(128, 64 * double, 64, 8, 3), Tile(128, 128, 64, 8, 3)
    return _fit(first, 2 if shape.gated else 1, size, facts), _fit(second, 1, size, facts)


def _fit(tile: Tile, matrices: int, size: int, facts: GpuFacts) -> Tile:
    """The tile with as many stages, then as deep steps, as shared memory holds."""
    step = (tile.bm + matrices * tile.bn) * tile.bk * size
    stages = min(tile.stages, facts.shared_bytes // step)
    if stages >= 2:
        return tile._replace(stages=stages)
    return _fit(tile._replace(bk=tile.bk // 2), matrices, size, facts)
