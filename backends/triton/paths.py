"""A plan turned into launches whose grids and constants are computed once, for one number of tokens.

T tokens, K experts per token, P = T * K pairs, E experts, D model width, F expert width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from moec.backends.triton.choose import GEMV, PERSISTENT, Plan, Rows, Tile
from moec.backends.triton.gpu import GpuFacts
from moec.backends.triton.kernels import gemv, group, persistent, tiles
from moec.backends.triton.kernels.combine import combine
from moec.backends.triton.launch import Launch
from moec.backends.triton.operands import Product, Stored
from moec.backends.triton.spec import Layer

TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.int8: tl.int8,
}


class Run(Protocol):
    """One plan for one number of tokens; ids is None for one expert that takes every row."""

    def __call__(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        valid: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Site:
    """What the launches of one call share."""

    layer: Layer
    facts: GpuFacts
    k: int
    weighted: bool
    has_valid: bool
    precision: str
    """Of products: ieee or tf32, or wide in the interpreter."""
    made: dict[Any, Launch]
    """Launches by all that tells them apart, so that numbers of tokens share compiled kernels."""

    @property
    def pdl(self) -> bool:
        """Whether a kernel may start before the one it follows has ended."""
        return self.facts.hopper and not self.facts.interpreted

    def launch(self, kernel: Any, constants: dict[str, Any], *, warps: int = 4, stages: int = 1, pdl: bool) -> Launch:
        """The launch of a kernel with these constants, made once."""
        key = (kernel.__name__, tuple(constants.items()), warps, stages, pdl)
        if key not in self.made:
            self.made[key] = Launch(kernel, constants, warps=warps, stages=stages, pdl=pdl)
        return self.made[key]


def make_run(site: Site, plan: Plan, tokens: int) -> Run:
    """The launches of a plan for so many tokens, at least one."""
    if plan.path == GEMV:
        return gemv_run(site, plan, tokens)
    return grouped_run(site, plan, tokens)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _matrix(w: Stored) -> dict[str, Any]:
    return {
        "W_E": w.stride,
        "W_N": w.strides[0],
        "W_C": w.strides[1],
        "LISTED": w.listed,
        "W_DTYPE": TYPES[w.dtype],
    }


def _vector(v: Stored | None, letter: str) -> dict[str, Any]:
    names = [f"{letter}_{part}" for part in ("E", "N", "LISTED", "DTYPE")]
    values = (0, 0, 0, tl.float32) if v is None else (v.stride, v.strides[0], v.listed, TYPES[v.dtype])
    return dict(zip(names, values, strict=True))


def _base(part: Stored | None) -> torch.Tensor | None:
    return None if part is None else part.base


def _vectors(product: Product) -> tuple[dict[str, Any], dict[str, Any]]:
    return _vector(product.b, "B") | _vector(product.scale, "S"), {
        "HAS_BIAS": product.b is not None,
        "HAS_SCALE": product.scale is not None,
    }


def gemv_run(site: Site, plan: Plan, tokens: int) -> Run:
    """Two launches, one row at a time."""
    layer, k = site.layer, site.k
    gate, up, down = layer.gate, layer.up or layer.gate, layer.down
    assert isinstance(plan.first, Rows)
    assert isinstance(plan.second, Rows)
    vectors, flags = _vectors(gate)
    first = site.launch(
        gemv.gemv_in,
        {"K": k, "E": layer.experts, "D": layer.d, "F": layer.f}
        | _matrix(gate.w)
        | vectors
        | layer.activation
        | {"HAS_VALID": site.has_valid}
        | flags
        | {"BN": plan.first.rows, "BC": plan.first.inputs, "PDL": site.pdl},
        warps=plan.first.warps,
        pdl=False,
    )
    vectors, flags = _vectors(down)
    second = site.launch(
        gemv.gemv_out,
        {"K": k, "E": layer.experts, "F": layer.f, "O": layer.o}
        | _matrix(down.w)
        | vectors
        | {"HAS_VALID": site.has_valid}
        | flags
        | {"WEIGHTED": site.weighted, "BN": plan.second.rows, "BC": plan.second.inputs, "PDL": site.pdl},
        warps=plan.second.warps,
        pdl=site.pdl,
    )
    grid = (cdiv(layer.f, plan.first.rows), tokens * k, 1)
    grid_out = (cdiv(layer.o, plan.second.rows), tokens, 1)
    in_bases = tuple(_base(part) for part in (gate.w, up.w, gate.b, up.b, gate.scale, up.scale))
    out_bases = tuple(_base(part) for part in (down.w, down.b, down.scale))
    size = (tokens * k, layer.f)

    def run(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        valid: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        h = x.new_empty(size)
        first(grid, x, ids, valid, *in_bases, h, tokens)
        second(grid_out, h, ids, weights, valid, *out_bases, out, tokens)

    return run


def grouping(site: Site, tokens: int, rows: int, most: int) -> Callable[[torch.Tensor, Any, torch.Tensor], None]:
    """ids, valid, meta -> meta filled, in one launch for few pairs and three for many."""
    experts, k = site.layer.experts, site.k
    pairs, pdl = tokens * k, site.pdl
    common = {"K": k, "E": experts}
    at = group.at_tiles(experts)
    if pairs <= group.SMALL_PAIRS:
        bins = triton.next_power_of_2(max(experts, 2))
        sizes = {"CHUNK": group.LANE_PAIRS, "STEP": group.STEP, "PDL": pdl}
        more = {"EB": bins, "AT": at, "HAS_VALID": site.has_valid}
        small = site.launch(group.group_small, common | more | sizes, pdl=False)
        grid = (1 + cdiv(pairs, group.LANE_PAIRS), 1, 1)

        def run_small(ids: torch.Tensor, valid: torch.Tensor | None, meta: torch.Tensor) -> None:
            small(grid, ids, valid, meta, pairs, rows, most)

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

    def run_chunks(ids: torch.Tensor, valid: torch.Tensor | None, meta: torch.Tensor) -> None:
        counts = meta.new_empty((chunks + 1) * bins)
        totals = counts[chunks * bins :]
        count((chunks, 1, 1), ids, valid, counts, pairs)
        total((bins // min(bins, 8), 1, 1), counts, totals, chunks)
        place((1 + chunks, 1, 1), ids, valid, counts, totals, meta, pairs, rows, most)

    return run_chunks


def grouped_run(site: Site, plan: Plan, tokens: int) -> Run:
    """Grouping, both products over tiles, and the sum over each token's experts."""
    layer, k = site.layer, site.k
    assert isinstance(plan.first, Tile)
    assert isinstance(plan.second, Tile)
    assert plan.first.bm == plan.second.bm, "both products go through the same tiles"
    pairs = tokens * k
    most = group.max_tiles(pairs, layer.experts, plan.first.bm)
    at = group.at_tiles(layer.experts)
    meta_size = at + 2 * most + pairs
    arrange = grouping(site, tokens, plan.first.bm, most)
    products = persistent_products if plan.path == PERSISTENT else tile_products
    first, second = products(site, plan.first, plan.second, most, at)
    bo = min(1024, triton.next_power_of_2(layer.o))
    last = site.launch(
        combine,
        {"K": k, "E": layer.experts, "O": layer.o, "HAS_VALID": site.has_valid, "BT": 1, "BO": bo, "PDL": site.pdl},
        pdl=site.pdl,
    )
    last_grid = (cdiv(layer.o, bo), tokens, 1)

    def run(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        valid: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        meta = torch.empty(meta_size, dtype=torch.int32, device=x.device)
        h = x.new_empty((pairs, layer.f))
        y = x.new_empty((pairs, layer.o))
        arrange(ids, valid, meta)
        first(x, meta, h)
        second(h, meta, weights, y)
        last(last_grid, y, ids, valid, out, tokens)

    return run


Products = tuple[Callable[..., None], Callable[..., None]]


def tile_products(site: Site, one: Tile, two: Tile, most: int, at: int) -> Products:
    """Both products with plain loads."""
    layer = site.layer
    gate, up, down = layer.gate, layer.up or layer.gate, layer.down
    vectors, flags = _vectors(gate)
    first = site.launch(
        tiles.tiles_in,
        {"K": site.k, "E": layer.experts, "D": layer.d, "F": layer.f, "AT": at}
        | _matrix(gate.w)
        | vectors
        | layer.activation
        | flags
        | {"PRECISION": site.precision}
        | {"BM": one.bm, "BN": one.bn, "BK": one.bk, "GROUP": one.group, "PDL": site.pdl},
        warps=one.warps,
        stages=one.stages,
        pdl=site.pdl,
    )
    vectors, flags = _vectors(down)
    second = site.launch(
        tiles.tiles_out,
        {"E": layer.experts, "F": layer.f, "O": layer.o, "AT": at}
        | _matrix(down.w)
        | vectors
        | flags
        | {"WEIGHTED": site.weighted, "PRECISION": site.precision}
        | {"BM": two.bm, "BN": two.bn, "BK": two.bk, "GROUP": two.group, "PDL": site.pdl},
        warps=two.warps,
        stages=two.stages,
        pdl=site.pdl,
    )
    in_bases = tuple(_base(part) for part in (gate.w, up.w, gate.b, up.b, gate.scale, up.scale))
    out_bases = tuple(_base(part) for part in (down.w, down.b, down.scale))
    grid = (most * cdiv(layer.f, one.bn), 1, 1)
    grid_out = (most * cdiv(layer.o, two.bn), 1, 1)

    def run_first(x: torch.Tensor, meta: torch.Tensor, h: torch.Tensor) -> None:
        first(grid, x, meta, *in_bases, h, most)

    def run_second(h: torch.Tensor, meta: torch.Tensor, weights: torch.Tensor | None, y: torch.Tensor) -> None:
        second(grid_out, h, meta, weights, *out_bases, y, most)

    return run_first, run_second


def descriptor(w: Stored, bn: int, bk: int) -> Any:
    """A TMA descriptor over [E, N, C], or over [E, C, N] where the outputs lie side by side."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    turned = w.strides[1] != 1
    n, c = w.shape
    base = w.base
    if turned:
        return TensorDescriptor(base, [w.experts, c, n], [w.stride, w.strides[1], 1], [1, bk, bn])
    return TensorDescriptor(base, [w.experts, n, c], [w.stride, w.strides[0], 1], [1, bn, bk])


def persistent_products(site: Site, one: Tile, two: Tile, most: int, at: int) -> Products:
    """Both products with one program per multiprocessor and weights by TMA."""
    layer = site.layer
    gate, up, down = layer.gate, layer.up or layer.gate, layer.down
    programs = site.facts.processors
    _, flags = _vectors(gate)
    first = site.launch(
        persistent.persistent_in,
        {"K": site.k, "E": layer.experts, "D": layer.d, "F": layer.f, "AT": at, "TURNED": gate.w.strides[1] != 1}
        | _vector(gate.b, "B")
        | layer.activation
        | {"HAS_BIAS": flags["HAS_BIAS"], "PRECISION": site.precision}
        | {"BM": one.bm, "BN": one.bn, "BK": one.bk, "GROUP": one.group}
        | {"PROGRAMS": programs, "FLATTEN": one.flatten, "PDL": site.pdl},
        warps=one.warps,
        stages=one.stages,
        pdl=site.pdl,
    )
    _, flags = _vectors(down)
    second = site.launch(
        persistent.persistent_out,
        {"E": layer.experts, "F": layer.f, "O": layer.o, "AT": at, "TURNED": down.w.strides[1] != 1}
        | _vector(down.b, "B")
        | {"HAS_BIAS": flags["HAS_BIAS"], "WEIGHTED": site.weighted, "PRECISION": site.precision}
        | {"BM": two.bm, "BN": two.bn, "BK": two.bk, "GROUP": two.group}
        | {"PROGRAMS": programs, "FLATTEN": two.flatten, "PDL": site.pdl},
        warps=two.warps,
        stages=two.stages,
        pdl=site.pdl,
    )
    gate_at, up_at = (descriptor(p.w, one.bn, one.bk) for p in (gate, up))
    down_at = descriptor(down.w, two.bn, two.bk)
    b_gate, b_up, b_down = _base(gate.b), _base(up.b), _base(down.b)
    grid = (programs, 1, 1)

    def run_first(x: torch.Tensor, meta: torch.Tensor, h: torch.Tensor) -> None:
        first(grid, x, meta, gate_at, up_at, b_gate, b_up, h, most)

    def run_second(h: torch.Tensor, meta: torch.Tensor, weights: torch.Tensor | None, y: torch.Tensor) -> None:
        second(grid, h, meta, weights, down_at, b_down, y, most)

    return run_first, run_second
