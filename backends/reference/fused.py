"""What the fused ops mean: the ops they name one after the other, values between kept in fp32 (f64 for f64).

T tokens, K experts per token, E experts, D model width, F expert width, O output width, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.backends.reference.activations import fused
from moec.backends.reference.combining import combine
from moec.backends.reference.dtypes import wide
from moec.backends.reference.grouping import gather, group
from moec.backends.reference.joined import Experts, whole
from moec.backends.reference.products import grouped_linear, linear
from moec.ir import DenseFfn, ExpertFfn, ExpertGlu
from moec.ir.ops_fused import FusedActivation


@dataclass(frozen=True)
class Matrix:
    """The weights of one product, for E experts or for one: w[E, N, C], b[E, N]?, scale[E, N]?, or without E."""

    w: Experts
    b: Experts | None
    scale: Experts | None
    outputs: int
    """N."""


def expert_glu(
    op: ExpertGlu, x: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, first: Matrix, up: Matrix | None
) -> torch.Tensor:
    """x[T, D], order[R], offsets[E+1] -> [R, F]."""
    rows = gather(x, order, op.k).to(wide(x))
    a = _activated(op, rows, offsets, first, up)
    return _zero_past(a, offsets).to(x.dtype)


def _activated(
    op: FusedActivation, rows: torch.Tensor, offsets: torch.Tensor, first: Matrix, up: Matrix | None
) -> torch.Tensor:
    h = _grouped(rows, offsets, first)
    u = None if up is None else _grouped(rows, offsets, up)
    return fused(h, u, op)


def _zero_past(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Rows from offsets[E] on as zeros: an activation need not give 0 for 0."""
    past = torch.arange(rows.shape[0], device=rows.device) >= offsets[-1]
    return rows.masked_fill(past.unsqueeze(1), 0)


def expert_ffn(
    op: ExpertFfn,
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    first: Matrix,
    up: Matrix | None,
    second: Matrix,
    num_experts: int,
) -> torch.Tensor:
    """x[T, D], experts[T, K], weights[T, K] -> [T, O]."""
    order, offsets = group(experts, num_experts)
    rows = gather(x, order, experts.shape[1]).to(wide(x))
    a = _activated(op, rows, offsets, first, up)
    y = _grouped(a, offsets, second)
    return combine(y, order, weights).to(x.dtype)


def dense_ffn(op: DenseFfn, x: torch.Tensor, first: Matrix, up: Matrix | None, second: Matrix) -> torch.Tensor:
    """x[..., D] -> [..., O]."""
    rows = x.to(wide(x))
    h = _linear(rows, first)
    a = fused(h, None if up is None else _linear(rows, up), op)
    return _linear(a, second).to(x.dtype)


def _grouped(rows: torch.Tensor, offsets: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    return grouped_linear(rows, offsets, matrix.w, matrix.b, matrix.scale, outputs=matrix.outputs)


def _linear(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    b, scale = (None if part is None else whole(part) for part in (matrix.b, matrix.scale))
    return linear(x, matrix.w, b, scale)
