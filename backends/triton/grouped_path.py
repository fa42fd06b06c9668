"""Grouping, both products over tiles, and the sum over each token's experts.

T tokens, K experts per token, P = T * K pairs, E experts, D model width, F expert width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from moec.backends.triton.choose import PERSISTENT, Plan, Tile
from moec.backends.triton.kernels import group
from moec.backends.triton.kernels.combine import clear_rows, combine
from moec.backends.triton.launch import current_stream
from moec.backends.triton.products import persistent_products, tile_products
from moec.backends.triton.site import Site, cdiv


def grouping(site: Site, tokens: int, rows: int, most: int) -> Callable[..., None]:
    """ids, valid, meta -> meta filled, in one launch for few pairs and three for many."""
    experts, k = site.layer.experts, site.k
    pairs, pdl = tokens * k, site.pdl
    common = {"K": k, "E": experts}
    at = group.at_tiles(experts)
    if pairs <= group.SMALL_PAIRS:
        bins = triton.next_power_of_2(max(experts, 2))
        sizes = {"CHUNK": group.LANE_PAIRS, "STEP": group.STEP, "BLOCK": 512 if pairs <= 512 else 4096, "PDL": pdl}
        more = {"EB": bins, "AT": at, "HAS_VALID": site.has_valid}
        small = site.launch(group.group_small, common | more | sizes, pdl=False)
        grid = (1 + cdiv(pairs, group.LANE_PAIRS), 1, 1)

        def run_small(stream: int, ids: torch.Tensor, valid: torch.Tensor | None, meta: torch.Tensor) -> None:
            small(stream, grid, ids, valid, meta, pairs, rows, most)

        return run_small
    bins = triton.next_power_of_2(experts + 1)
    chunks = cdiv(pairs, group.CHUNK)
    flag = {"HAS_VALID": site.has_valid}
    count = site.launch(
        group.count_chunks, common | {"EB": bins} | flag | {"CHUNK": group.CHUNK, "PDL": pdl}, pdl=False
    )
    total = site.launch(group.sum_chunks, {"EB": bins, "BE": min(bins, 8), "BLOCK": 256, "PDL": pdl}, pdl=pdl)
    place = site.launch(
        group.place_chunks,
        common | {"EB": bins, "AT": at} | flag | {"CHUNK": group.CHUNK, "STEP": 16, "PDL": pdl},
        pdl=pdl,
    )

    def run_chunks(stream: int, ids: torch.Tensor, valid: torch.Tensor | None, meta: torch.Tensor) -> None:
        counts = meta.new_empty((chunks + 1) * bins)
        totals = counts[chunks * bins :]
        count(stream, (chunks, 1, 1), ids, valid, counts, pairs)
        total(stream, (bins // min(bins, 8), 1, 1), counts, totals, chunks)
        place(stream, (1 + chunks, 1, 1), ids, valid, counts, totals, meta, pairs, rows, most)

    return run_chunks


@dataclass(frozen=True, slots=True)
class GroupedRun:
    """The four steps of a call; each takes the current stream first."""

    arrange: Callable[..., None]
    """stream, ids, valid, meta: fills meta."""
    first: Callable[..., None]
    """stream, x, meta, h: fills h[P, F]."""
    second: Callable[..., None]
    """stream, h, meta, weights, y: fills y[P, O]."""
    last: Callable[..., None]
    """stream, y, ids, valid, out: fills out[T, O]."""
    meta_size: int
    h_size: tuple[int, int]
    y_size: tuple[int, int] | None
    """None where each token has one expert: its row is the token's result."""

    def __call__(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        valid: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        meta = torch.empty(self.meta_size, dtype=torch.int32, device=x.device)
        h = x.new_empty(self.h_size)
        y = out if self.y_size is None else x.new_empty(self.y_size)
        stream = current_stream(x.device)
        self.arrange(stream, ids, valid, meta)
        self.first(stream, x, meta, h)
        self.second(stream, h, meta, weights, y)
        self.last(stream, y, ids, valid, out)


def grouped_run(site: Site, plan: Plan, tokens: int) -> GroupedRun:
    """The launches of a plan of tiles for so many tokens."""
    layer, k = site.layer, site.k
    assert isinstance(plan.first, Tile)
    assert isinstance(plan.second, Tile)
    assert plan.first.bm == plan.second.bm, "both products go through the same tiles"
    pairs = tokens * k
    most = group.max_tiles(pairs, layer.experts, plan.first.bm)
    at = group.at_tiles(layer.experts)
    products = persistent_products if plan.path == PERSISTENT else tile_products
    first, second = products(site, plan.first, plan.second, most, at)
    return GroupedRun(
        grouping(site, tokens, plan.first.bm, most),
        first,
        second,
        summing(site, tokens),
        at + 2 * most + pairs,
        (pairs, layer.f),
        None if k == 1 else (pairs, layer.o),
    )


def summing(site: Site, tokens: int) -> Callable[..., None]:
    """y, ids, valid, out -> out[T, O] filled."""
    layer = site.layer
    if site.k == 1:
        return clearing(site, tokens)
    bo = min(1024, triton.next_power_of_2(layer.o))
    constants = {"K": site.k, "E": layer.experts, "O": layer.o, "HAS_VALID": site.has_valid}
    last = site.launch(combine, constants | {"BT": 1, "BO": bo, "PDL": site.pdl}, pdl=site.pdl)
    grid = (tokens, cdiv(layer.o, bo), 1)

    def run(stream: int, y: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor | None, out: torch.Tensor) -> None:
        last(stream, grid, y, ids, valid, out, tokens)

    return run


def clearing(site: Site, tokens: int) -> Callable[..., None]:
    """y, ids, valid, out -> zeros in the rows of out whose token has no expert."""
    constants = {"E": site.layer.experts, "O": site.layer.o, "HAS_VALID": site.has_valid, "BT": 128, "BO": 128}
    clear = site.launch(clear_rows, constants | {"PDL": site.pdl}, pdl=site.pdl)
    grid = (cdiv(tokens, 128), 1, 1)

    def run(stream: int, y: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor | None, out: torch.Tensor) -> None:
        del y
        clear(stream, grid, ids, valid, out, tokens)

    return run
