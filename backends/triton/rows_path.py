"""The path of one row at a time as two launches.

T tokens, K experts per token, P = T * K pairs, E experts, D model width, F expert width, O output width.
"""

from __future__ import annotations

import torch

from moec.backends.triton.choose import Plan, Rows
from moec.backends.triton.kernels import gemv
from moec.backends.triton.launch import AllReady, address, current_stream
from moec.backends.triton.site import Run, Site, base, cdiv, matrix, vectors


def gemv_run(site: Site, plan: Plan, tokens: int) -> Run:
    """Two launches, one row at a time."""
    layer, k = site.layer, site.k
    gate, up, down = layer.gate, layer.up or layer.gate, layer.down
    assert isinstance(plan.first, Rows)
    assert isinstance(plan.second, Rows)
    more, flags = vectors(gate)
    first = site.launch(
        gemv.gemv_in,
        {"K": k, "E": layer.experts, "D": layer.d, "F": layer.f}
        | matrix(gate.w)
        | more
        | layer.activation
        | {"HAS_VALID": site.has_valid}
        | flags
        | {"BN": plan.first.rows, "BC": plan.first.inputs, "PDL": site.pdl},
        warps=plan.first.warps,
        pdl=False,
    )
    more, flags = vectors(down)
    second = site.launch(
        gemv.gemv_out,
        {"K": k, "E": layer.experts, "F": layer.f, "O": layer.o}
        | matrix(down.w)
        | more
        | {"HAS_VALID": site.has_valid}
        | flags
        | {"WEIGHTED": site.weighted, "BN": plan.second.rows, "BC": plan.second.inputs, "PDL": site.pdl},
        warps=plan.second.warps,
        pdl=site.pdl,
    )
    grid = (cdiv(layer.f, plan.first.rows), tokens * k, 1)
    grid_out = (cdiv(layer.o, plan.second.rows), tokens, 1)
    in_bases = tuple(base(part) for part in (gate.w, up.w, gate.b, up.b, gate.scale, up.scale))
    out_bases = tuple(base(part) for part in (down.w, down.b, down.scale))
    size = (tokens * k, layer.f)
    ready = AllReady((first, second))

    def run(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        valid: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        h = x.new_empty(size)
        stream = current_stream(x.device)
        if ready:
            at, at_h, at_ids, at_valid = x.data_ptr(), h.data_ptr(), ids.data_ptr(), address(valid)
            first(stream, grid, at, at_ids, at_valid, *in_bases, at_h, tokens)
            second(stream, grid_out, at_h, at_ids, address(weights), at_valid, *out_bases, out.data_ptr(), tokens)
        else:
            first(stream, grid, x, ids, valid, *in_bases, h, tokens)
            second(stream, grid_out, h, ids, weights, valid, *out_bases, out, tokens)

    return run
