"""What tuning tries: paths and tiles near what the cost model takes, as far as the GPU's shared memory lets them be.

T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from moec.backends.triton.choose import GEMV, PERSISTENT, TILES, Plan, Rows, Shape, Tile, choose, expected_hit
from moec.backends.triton.gpu import GpuFacts
from moec.backends.triton.store import HERE

FEW_SHARING = 2.0
"""Pairs per hit expert up to which the path of single rows is tried."""
FEW_ROWS, MANY_ROWS = 4, 96
"""Rows per expert from which persistent tiles are tried, and up to which tiles with plain loads are."""


def paths(shape: Shape, tokens: int, k: int, facts: GpuFacts) -> list[Plan]:
    """One plan for each path worth trying, the cost model's own first."""
    first = choose(shape, tokens, k, facts)._replace(origin=HERE)
    rows = tokens * k / max(expected_hit(tokens, k, shape.experts), 1.0)
    found = [first]
    if first.path != GEMV and rows <= FEW_SHARING:
        found.append(Plan(GEMV, Rows(4, 1024), Rows(4, 1024), HERE))
    if first.path != TILES and tokens > 1 and rows <= MANY_ROWS:
        found.append(Plan(TILES, Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4), HERE))
    tma = shape.tma and facts.hopper and shape.weights == shape.dtype and shape.dtype.itemsize == 2
    if first.path != PERSISTENT and tma and rows >= FEW_ROWS:
        found.append(Plan(PERSISTENT, Tile(64, 128, 64, 4, 4), Tile(64, 256, 64, 4, 4), HERE))
    return found


def rows_near(rows: Rows) -> Iterator[Rows]:
    """Other shapes of the path of single rows."""
    for count, inputs, warps in product((2, 4, 8), (512, 1024, 2048), (4, 8)):
        other = Rows(count, inputs, warps)
        if other != rows and 1024 <= count * inputs // (warps // 4) <= 8192:
            yield other


def tiles_near(tile: Tile, path: str, itemsize: int, facts: GpuFacts) -> Iterator[Tile]:
    """Other tiles with the same rows."""
    wide = path == PERSISTENT
    outputs = (64, 128, 256) if wide else (16, 32, 64, 128)
    steps = (64, 128) if wide else (64, 128, 256)
    warps = (4, 8) if wide else (4,)
    seen = {tile}
    for bn, bk, num_warps, stages in product(outputs, steps, warps, (3, 4, 5)):
        other = tile._replace(bn=bn, bk=bk, warps=num_warps, stages=stages)
        # Twice, as the first product may hold tiles of both gate and up.
        fits = stages * (tile.bm + 2 * bn) * bk * itemsize <= facts.shared_bytes
        busy = tile.bm * bn >= 512 and not (num_warps == 8 and tile.bm * bn < 8192)
        if fits and busy and other not in seen:
            seen.add(other)
            yield other
    if wide:
        yield tile._replace(flatten=not tile.flatten)


def row_counts(plan: Plan) -> list[int]:
    """Rows of tiles to try; both products go through the same."""
    if isinstance(plan.first, Rows):
        return []
    sizes = (64, 128) if plan.path == PERSISTENT else (16, 32, 64)
    return [size for size in sizes if size != plan.first.bm]
