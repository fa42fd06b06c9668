"""Tiles of the products that gradients take, from the rows of a tile, the element type and the GPU.

Rows are those of the grouping, which the forward chose from the rows per expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.backends.triton.choose import TILES, Plan, Tile
from moec.backends.triton.gpu import GpuFacts
from moec.backends.triton.spec import Layer

FALLBACK = Plan(TILES, Tile(16, 32, 64, 4, 3), Tile(16, 64, 64, 4, 3))
"""For few tokens: recording gradients groups them always."""

FEW_ROWS = 128
"""Rows per expert up to which writing a gradient takes longer than its sums: programs are kept small, to overlap."""


@dataclass(frozen=True, slots=True)
class GradientTiles:
    """Tiles by product: the first with both its results kept, then backward."""

    first: Tile
    hidden: Tile
    inputs: Tile
    weights: Tile
    """bm outputs and bn inputs of a matrix, bk rows of a step."""


def gradient_tiles(layer: Layer, bm: int, pairs: int, facts: GpuFacts) -> GradientTiles:
    """The tiles for a layer whose rows, so many in all, come in tiles of `bm`."""
    size = layer.dtype.itemsize
    gated = layer.up is not None
    if size == 4:
        # Products of fp32 numbers run on the ordinary units, which need registers for both sides.
        first = Tile(bm, 32 if gated else 64, 32, 4, 3)
        other, weights = Tile(bm, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3)
        narrow = _fit(other, size, facts)
        return GradientTiles(
            _fit(first, size, facts, 2 if gated else 1), narrow, narrow, _ahead(_fit(weights, size, facts))
        )
    warps, group = (8, 16) if bm >= 128 else (4, 8)
    wide = facts.hopper and bm >= 128
    first = Tile(bm, 128 if wide or not gated else 64, 64, warps, 3, group)
    hidden = Tile(bm, 128, 64, warps, 4 if wide else 3, group)
    inputs = Tile(bm, 256 if wide else 128, 64, warps, 3, group)
    few = pairs <= FEW_ROWS * min(pairs, layer.experts)
    weights = Tile(128, 256 if facts.hopper and not few else 128, 64, 4 if few else 8, 2 if few else 3)
    return GradientTiles(
        _fit(first, size, facts, 2 if gated else 1),
        _fit(hidden, size, facts),
        _fit(inputs, size, facts),
        _ahead(_fit(weights, size, facts)),
    )


def _ahead(tile: Tile) -> Tile:
    """Stages for loads behind loads: Triton divides them between gathered rows and the places they come from."""
    return tile._replace(stages=2 * tile.stages - 1)


def _fit(tile: Tile, size: int, facts: GpuFacts, matrices: int = 1) -> Tile:
    """The tile with as many stages, then as deep steps, as shared memory holds."""
    step = (tile.bm + matrices * tile.bn) * tile.bk * size
    stages = min(tile.stages, facts.shared_bytes // step)
    if stages >= 2:
        return tile._replace(stages=stages)
    return _fit(tile._replace(bk=tile.bk // 2), size, facts, matrices)
