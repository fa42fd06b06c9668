"""Both products over tiles as launches: with plain loads, and persistent with TMA.

T tokens, K experts per token, P = T * K pairs, E experts, D model width, F expert width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from moec.backends.triton.choose import Tile
from moec.backends.triton.kernels import persistent, tiles
from moec.backends.triton.operands import Stored
from moec.backends.triton.site import Site, base, cdiv, matrix, vector, vectors

Products = tuple[Callable[..., None], Callable[..., None]]


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

    def run_first(stream: int, x: torch.Tensor, meta: torch.Tensor, h: torch.Tensor) -> None:
        first(stream, grid, x, meta, *in_bases, h, most)

    def run_second(
        stream: int, h: torch.Tensor, meta: torch.Tensor, weights: torch.Tensor | None, y: torch.Tensor
    ) -> None:
        second(stream, grid_out, h, meta, weights, *out_bases, y, most)

    return run_first, run_second


def descriptor(w: Stored, bn: int, bk: int) -> Any:
    """A TMA descriptor over [E, N, C], or over [E, C, N] where the outputs lie side by side."""
    turned = w.strides[1] != 1
    n, c = w.shape
    base = w.base
    if turned:
        return TensorDescriptor(base, [w.experts, c, n], [w.stride, w.strides[1], 1], [1, bk, bn])
    return TensorDescriptor(base, [w.experts, n, c], [w.stride, w.strides[0], 1], [1, bn, bk])


def joint_descriptor(gate: Stored, up: Stored, bn: int, bk: int) -> tuple[Any, bool] | None:
    """One TMA descriptor over [E, 2, F, D] of both, and whether up comes first; None where they do not lie so."""
    size = gate.dtype.itemsize
    gap = up.base.data_ptr() - gate.base.data_ptr()
    if gate.strides[1] != 1 or gap == 0 or gap % 16 or abs(gap) >= 1 << 40:
        return None
    base = gate.base if gap > 0 else up.base
    n, c = gate.shape
    strides = [gate.stride, abs(gap) // size, gate.strides[0], 1]
    return TensorDescriptor(base, [gate.experts, 2, n, c], strides, [1, 2, bn, bk]), gap < 0


def persistent_products(site: Site, one: Tile, two: Tile, most: int, at: int) -> Products:
    """Both products with one program per multiprocessor and weights by TMA."""
    layer = site.layer
    gate, up, down = layer.gate, layer.up or layer.gate, layer.down
    programs = site.facts.processors * one.per_processor
    programs_out = site.facts.processors * two.per_processor
    by_tma = layer.f * layer.dtype.itemsize % 16 == 0
    _, flags = vectors(gate)
    joint = None if layer.up is None else joint_descriptor(gate.w, up.w, one.bn, one.bk)
    gate_at: Any
    up_at: Any
    if joint is not None:
        gate_at, up_at = joint[0], None
    else:
        gate_at, up_at = (descriptor(p.w, one.bn, one.bk) for p in (gate, up))
    first = site.launch(
        persistent.persistent_in,
        {"K": site.k, "E": layer.experts, "D": layer.d, "F": layer.f, "AT": at, "TURNED": gate.w.strides[1] != 1}
        | {"JOINT": joint is not None, "SWAPPED": joint is not None and joint[1]}
        | vector(gate.b, "B")
        | layer.activation
        | {"HAS_BIAS": flags["HAS_BIAS"], "PRECISION": site.precision}
        | {"BM": one.bm, "BN": one.bn, "BK": one.bk, "GROUP": one.group}
        | {"PROGRAMS": programs, "FLATTEN": one.flatten, "PDL": site.pdl},
        warps=one.warps,
        stages=one.stages,
        pdl=site.pdl,
    )
    _, flags = vectors(down)
    second = site.launch(
        persistent.persistent_out,
        {"E": layer.experts, "F": layer.f, "O": layer.o, "AT": at, "TURNED": down.w.strides[1] != 1}
        | vector(down.b, "B")
        | {"HAS_BIAS": flags["HAS_BIAS"], "WEIGHTED": site.weighted, "PRECISION": site.precision}
        | {"BM": two.bm, "BN": two.bn, "BK": two.bk, "GROUP": two.group}
        | {"PROGRAMS": programs_out, "FLATTEN": two.flatten, "BY_TMA": by_tma, "PDL": site.pdl},
        warps=two.warps,
        stages=two.stages,
        pdl=site.pdl,
    )
    down_at = descriptor(down.w, two.bn, two.bk)
    b_gate, b_up, b_down = base(gate.b), base(up.b), base(down.b)
    grid, grid_out = (programs, 1, 1), (programs_out, 1, 1)

    def run_first(stream: int, x: torch.Tensor, meta: torch.Tensor, h: torch.Tensor) -> None:
        first(stream, grid, x, meta, gate_at, up_at, b_gate, b_up, h, most)

    def run_second(
        stream: int, h: torch.Tensor, meta: torch.Tensor, weights: torch.Tensor | None, y: torch.Tensor
    ) -> None:
        h_at = TensorDescriptor(h, h.shape, h.stride(), [two.bm, two.bk]) if by_tma else h
        second(stream, grid_out, h_at, meta, weights, down_at, b_down, y, most)

    return run_first, run_second
