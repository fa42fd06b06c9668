"""Which path and which tiles a number of tokens gets: from the layer's shape and the GPU, without asking the device.

T tokens, K experts per token, P = T * K pairs, E experts, D model width, F expert width, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from moec.backends.triton.gpu import GpuFacts

GEMV = "gemv"
TILES = "tiles"
PERSISTENT = "persistent"
SHARING = 1.15
"""Pairs per hit expert from which reading each expert once for all its rows pays."""


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
    gathered: bool = False
    """Whether tokens' rows are first copied into the experts' order, so that TMA can read them (first product)."""


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
    more = (
        f" g{part.group}"
        + " flat" * part.flatten
        + " gathered" * part.gathered
        + (f" x{part.per_processor}" if part.per_processor > 1 else "")
    )
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


def expected_hit(tokens: int, k: int, experts: int) -> float:
    """How many experts are hit when each token draws k different ones evenly."""
    missed: float = (1.0 - min(k, experts) / experts) ** tokens
    return experts * (1.0 - missed)


def choose(shape: Shape, tokens: int, k: int, facts: GpuFacts) -> Plan:
    """The plan for T tokens with K experts each."""
    pairs = max(tokens * k, 1)
    hit = max(expected_hit(tokens, k, shape.experts), 1.0)
    if pairs / hit <= SHARING or tokens <= 1:
        return Plan(GEMV, _rows(shape, shape.turned[0]), _rows(shape, shape.turned[1]))
    rows = pairs / hit
    wide = shape.dtype.itemsize == 4
    if rows >= 24 and shape.tma and facts.hopper and not wide and shape.weights == shape.dtype:
        return Plan(PERSISTENT, *_persistent_tiles(shape, rows))
    return Plan(TILES, *_small_tiles(shape, rows, facts))


def _rows(shape: Shape, turned: bool) -> Rows:
    if turned:
        return Rows(64, 64)
    return Rows(4, 1024 * 2 // max(shape.weights.itemsize, 2))


def _persistent_tiles(shape: Shape, rows: float) -> tuple[Tile, Tile]:
    bm = 64 if rows < 80 else 128
    warps = 4 if bm == 64 else 8
    first = Tile(bm, 128, 64, warps, 3) if shape.gated else Tile(bm, 256 if bm == 128 else 128, 64, warps, 3)
    return first, Tile(bm, 256 if bm == 128 else 128, 64, warps, 3)


def _small_tiles(shape: Shape, rows: float, facts: GpuFacts) -> tuple[Tile, Tile]:
    bm = 16
    while bm < 64 and bm < rows * 1.5:
        bm *= 2
    size = shape.dtype.itemsize
    if rows >= 64:
        first = Tile(64, 64, 128 // size, 4, 3)
        return first, Tile(64, 128 if size == 2 else 64, 128 // size, 4, 3)
    bk = 256 // size
    stages = _stages(bm, 64, bk, size, facts)
    return Tile(bm, 32 if shape.gated else 64, bk, 4, stages), Tile(bm, 64, bk, 4, stages)


def _stages(bm: int, bn: int, bk: int, size: int, facts: GpuFacts) -> int:
    """As deep as leaves room for two programs on a multiprocessor, 2 to 4."""
    return max(2, min(4, facts.shared_bytes // 2 // ((bm + bn) * bk * size)))
