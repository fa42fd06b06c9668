"""What stands around the products as launches: grouping pairs by expert, and the sums over each token's experts.

T tokens, K experts per token, P = T * K pairs, E experts, O output width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

from moec.backends.triton.kernels import group
from moec.backends.triton.kernels.combine import clear_rows, combine
from moec.backends.triton.launch import Launch
from moec.backends.triton.site import Site, cdiv

Step = Callable[..., None]


def arranging(site: Site, tokens: int, rows: int, most: int) -> tuple[Step, int, list[Launch]]:
    """(stream, ids, valid, meta, counts -> meta filled), the size of counts, the launches: one for few pairs, or three.

    `rows` and `most` are the rows of a tile and the most tiles there may be.
    """
    if tokens * site.k <= group.SMALL_PAIRS:
        return _arranging_few(site, tokens * site.k, rows, most)
    return _arranging_many(site, tokens * site.k, rows, most)


def _arranging_few(site: Site, pairs: int, rows: int, most: int) -> tuple[Step, int, list[Launch]]:
    experts = site.layer.experts
    constants = {"K": site.k, "E": experts, "EB": triton.next_power_of_2(max(experts, 2))}
    constants |= {"AT": group.at_tiles(experts), "HAS_VALID": site.has_valid}
    sizes = {"CHUNK": group.LANE_PAIRS, "STEP": group.STEP, "BLOCK": 512 if pairs <= 512 else 4096, "PDL": site.pdl}
    small = site.launch(group.group_small, constants | sizes, pdl=False)
    grid = (1 + cdiv(pairs, group.LANE_PAIRS), 1, 1)

    def run(stream: int, ids: Any, valid: Any, meta: Any, counts: Any) -> None:
        del counts
        small(stream, grid, ids, valid, meta, pairs, rows, most)

    return run, 0, [small]


def _arranging_many(site: Site, pairs: int, rows: int, most: int) -> tuple[Step, int, list[Launch]]:
    experts, pdl, flag = site.layer.experts, site.pdl, {"HAS_VALID": site.has_valid}
    common = {"K": site.k, "E": experts}
    bins = triton.next_power_of_2(experts + 1)
    chunks = cdiv(pairs, group.CHUNK)
    sizes = {"CHUNK": group.CHUNK, "PDL": pdl}
    count = site.launch(group.count_chunks, common | {"EB": bins} | flag | sizes, pdl=False)
    total = site.launch(group.sum_chunks, {"EB": bins, "BE": min(bins, 8), "BLOCK": 256, "PDL": pdl}, pdl=pdl)
    more = {"EB": bins, "AT": group.at_tiles(experts)} | flag | {"CHUNK": group.CHUNK, "STEP": 16, "PDL": pdl}
    place = site.launch(group.place_chunks, common | more, pdl=pdl)
    grids = (chunks, 1, 1), (bins // min(bins, 8), 1, 1), (1 + chunks, 1, 1)

    def run(stream: int, ids: Any, valid: Any, meta: Any, counts: Any) -> None:
        count(stream, grids[0], ids, valid, counts, pairs)
        total(stream, grids[1], counts, chunks)
        place(stream, grids[2], ids, valid, counts, meta, pairs, chunks, rows, most)

    return run, (chunks + 1) * bins, [count, total, place]


def summing(site: Site, tokens: int) -> tuple[Step, Launch]:
    """stream, y, ids, valid, out -> out[T, O] filled."""
    layer = site.layer
    if site.k == 1:
        return _clearing(site, tokens)
    bo = min(1024, triton.next_power_of_2(layer.o))
    constants = {"K": site.k, "E": layer.experts, "O": layer.o, "HAS_VALID": site.has_valid}
    last = site.launch(combine, constants | {"BT": 1, "BO": bo, "PDL": site.pdl}, pdl=site.pdl)
    grid = (tokens, cdiv(layer.o, bo), 1)

    def run(stream: int, y: Any, ids: Any, valid: Any, out: Any) -> None:
        last(stream, grid, y, ids, valid, out, tokens)

    return run, last


def _clearing(site: Site, tokens: int) -> tuple[Step, Launch]:
    """y, ids, valid, out -> zeros in the rows of out whose token has no expert."""
    constants = {"E": site.layer.experts, "O": site.layer.o, "HAS_VALID": site.has_valid, "BT": 128, "BO": 128}
    clear = site.launch(clear_rows, constants | {"PDL": site.pdl}, pdl=site.pdl)
    grid = (cdiv(tokens, 128), 1, 1)

    def run(stream: int, y: Any, ids: Any, valid: Any, out: Any) -> None:
        del y
        clear(stream, grid, ids, valid, out, tokens)

    return run, clear
