"""Both products over tiles as launches: with plain loads, and persistent with TMA.

T tokens, K experts per token, P = T * K pairs, E experts, D model width, F expert width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from triton.tools.tensor_descriptor import TensorDescriptor

from moec.backends.triton.choose import Tile
from moec.backends.triton.kernels import persistent, tiles
from moec.backends.triton.launch import Launch
from moec.backends.triton.operands import Stored
from moec.backends.triton.site import TYPES, Site, base, cdiv, matrix, vector, vectors

Products = tuple[tuple[Callable[..., None], Callable[..., None]], tuple[Launch, Launch]]
"""Both products, which take what grouped_path.py says, and their launches."""


def tile_products(site: Site, one: Tile, two: Tile, most: int, at: int) -> Products:
    """Both products with plain loads."""
    layer = site.layer
    gate, up, down = layer.gate, layer.up or layer.gate, layer.down
    more, flags = vectors(gate)
    first = site.launch(
        tiles.tiles_in,
        {"K": site.k, "E": layer.experts, "D": layer.d, "F": layer.f, "AT": at}
        | matrix(gate.w)
        | more
        | layer.activation
        | flags
        | {"PRECISION": site.precision}
        | {"BM": one.bm, "BN": one.bn, "BK": one.bk, "GROUP": one.group, "PDL": site.pdl},
        warps=one.warps,
        stages=one.stages,
        pdl=site.pdl,
    )
    more, flags = vectors(down)
    second = site.launch(
        tiles.tiles_out,
        {"E": layer.experts, "F": layer.f, "O": layer.o, "AT": at}
        | matrix(down.w)
        | more
        | flags
        | {"WEIGHTED": site.weighted, "PRECISION": site.precision}
        | {"BM": two.bm, "BN": two.bn, "BK": two.bk, "GROUP": two.group, "PDL": site.pdl},
        warps=two.warps,
        stages=two.stages,
        pdl=site.pdl,
    )
    in_bases = tuple(base(part) for part in (gate.w, up.w, gate.b, up.b, gate.scale, up.scale))
    out_bases = tuple(base(part) for part in (down.w, down.b, down.scale))
    grid = (most * cdiv(layer.f, one.bn), 1, 1)
    grid_out = (most * cdiv(layer.o, two.bn), 1, 1)

    def run_first(stream: int, x: Any, meta: Any, h: Any) -> None:
        first(stream, grid, x, meta, *in_bases, h, most)

    def run_second(stream: int, h: Any, meta: Any, weights: Any, y: Any) -> None:
        second(stream, grid_out, h, meta, weights, *out_bases, y, most)

    return (run_first, run_second), (first, second)


def descriptor(w: Stored, bn: int, bk: int) -> Any:
    """A TMA descriptor over [E, N, C], or over [E, C, N] where the outputs lie side by side; a table for a list."""
    if w.listed:
        return w.base
    turned = w.strides[1] != 1
    n, c = w.shape
    base = w.base
    if turned:
        return TensorDescriptor(base, [w.experts, c, n], [w.stride, w.strides[1], 1], [1, bk, bn])
    return TensorDescriptor(base, [w.experts, n, c], [w.stride, w.strides[0], 1], [1, bn, bk])


@dataclass(frozen=True, slots=True)
class Joint:
    """gate and up read together: the descriptor or table, elements from one to the other, and whether up is first."""

    at: Any
    gap: int
    swapped: bool


def joint(gate: Stored, up: Stored, bn: int, bk: int) -> Joint | None:
    """gate and up as one [E, 2, F, D]; None where they do not lie so."""
    gaps = {there.data_ptr() - here.data_ptr() for here, there in zip(gate.held, up.held, strict=True)}
    gap = gaps.pop()
    if gaps or gate.strides[1] != 1 or gap == 0 or gap % 16 or abs(gap) >= 1 << 40:
        return None
    first, elements = (gate if gap > 0 else up), abs(gap) // gate.dtype.itemsize
    if gate.listed:
        return Joint(first.base, elements, gap < 0)
    n, c = gate.shape
    strides = [gate.stride, elements, gate.strides[0], 1]
    return Joint(TensorDescriptor(first.base, [gate.experts, 2, n, c], strides, [1, 2, bn, bk]), elements, gap < 0)


def listed(w: Stored) -> dict[str, Any]:
    """The constants of weights that a kernel makes descriptors for itself, if there is a list of them."""
    return {"LISTED": w.listed > 0, "W_DTYPE": TYPES[w.dtype], "STRIDE": max(w.strides)}


def persistent_products(site: Site, one: Tile, two: Tile, most: int, at: int) -> Products:
    """Both products with one program per multiprocessor and weights by TMA.

    They start when what goes before them has ended: programs that start one by one, as multiprocessors become free,
    stay out of step to the end, and read from memory what programs in step find in the cache.
    """
    layer = site.layer
    gate, up, down = layer.gate, layer.up or layer.gate, layer.down
    programs = site.facts.processors * one.per_processor
    programs_out = site.facts.processors * two.per_processor
    by_tma = layer.f * layer.dtype.itemsize % 16 == 0
    _, flags = vectors(gate)
    both = None if layer.up is None else joint(gate.w, up.w, one.bn, one.bk)
    gate_at, up_at = (both.at, None) if both else (descriptor(p.w, one.bn, one.bk) for p in (gate, up))
    first = site.launch(
        persistent.persistent_in,
        {"K": site.k, "E": layer.experts, "D": layer.d, "F": layer.f, "AT": at, "TURNED": gate.w.strides[1] != 1}
        | {"JOINT": both is not None, "SWAPPED": both is not None and both.swapped}
        | listed(gate.w)
        | {"GAP": both.gap if both is not None and gate.w.listed else 0}
        | vector(gate.b, "B")
        | layer.activation
        | {"HAS_BIAS": flags["HAS_BIAS"], "PRECISION": site.precision}
        | {"BM": one.bm, "BN": one.bn, "BK": one.bk, "GROUP": one.group}
        | {"PROGRAMS": programs, "FLATTEN": one.flatten, "PDL": site.pdl},
        warps=one.warps,
        stages=one.stages,
        pdl=False,
        scratch=gate.w.listed > 0,
    )
    _, flags = vectors(down)
    second = site.launch(
        persistent.persistent_out,
        {"E": layer.experts, "F": layer.f, "O": layer.o, "AT": at, "TURNED": down.w.strides[1] != 1}
        | listed(down.w)
        | vector(down.b, "B")
        | {"HAS_BIAS": flags["HAS_BIAS"], "WEIGHTED": site.weighted, "PRECISION": site.precision}
        | {"BM": two.bm, "BN": two.bn, "BK": two.bk, "GROUP": two.group}
        | {"PROGRAMS": programs_out, "FLATTEN": two.flatten, "BY_TMA": by_tma, "PDL": site.pdl},
        warps=two.warps,
        stages=two.stages,
        pdl=False,
        scratch=down.w.listed > 0,
    )
    down_at = descriptor(down.w, two.bn, two.bk)
    b_gate, b_up, b_down = base(gate.b), base(up.b), base(down.b)
    grid, grid_out = (programs, 1, 1), (programs_out, 1, 1)

    def run_first(stream: int, x: Any, meta: Any, h: Any) -> None:
        first(stream, grid, x, meta, gate_at, up_at, b_gate, b_up, h, most)

    def run_second(stream: int, h: Any, meta: Any, weights: Any, y: Any) -> None:
        rows = TensorDescriptor(h, h.shape, h.stride(), [two.bm, two.bk]) if by_tma else h
        second(stream, grid_out, rows, meta, weights, down_at, b_down, y, most)

    return (run_first, run_second), (first, second)
