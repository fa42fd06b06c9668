"""Normalisation of rows. R rows, E experts, D width."""

from __future__ import annotations

import torch

from moec.backends.reference.dtypes import wide
from moec.backends.reference.joined import Experts, whole
from moec.ir import BatchNorm, Norm

BatchOperands = tuple[Experts, Experts, Experts | None, Experts | None]
"""mean, var, w and b, each [E, D]."""


def norm(op: Norm, x: torch.Tensor, offsets: torch.Tensor | None, w: Experts | None, b: Experts | None) -> torch.Tensor:
    """x[..., D], w[D]?, b[D]? -> [..., D]; or with offsets[E+1], w[E, D]?, b[E, D]? per expert. In fp32, rounded once.

    Rows from offsets[E] on come out as zeros.
    """
    y = x.to(wide(x))
    if op.kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    if op.kind != "none":
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + op.eps)
    if offsets is None:
        return _shift(op, y, None if w is None else whole(w), None if b is None else whole(b)).to(x.dtype)
    bounds = offsets.tolist()
    parts = []
    for e in range(len(bounds) - 1):
        part = y[bounds[e] : bounds[e + 1]]
        if part.shape[0]:
            parts.append(_shift(op, part, None if w is None else w[e], None if b is None else b[e]))
    parts.append(y.new_zeros(y.shape[0] - bounds[-1], y.shape[1]))
    return torch.cat(parts).to(x.dtype)


def batch_norm(op: BatchNorm, x: torch.Tensor, offsets: torch.Tensor, given: BatchOperands) -> torch.Tensor:
    """x[R, D], offsets[E+1] -> [R, D] by each expert's own mean, var, w and b[E, D]. In fp32, rounded once.

    Rows from offsets[E] on come out as zeros.
    """
    kind = wide(x)
    mean, var, w, b = (None if t is None else whole(t).to(kind) for t in given)
    assert mean is not None
    assert var is not None
    # A factor and a shift for each feature, as torch's own batch norm takes them: one pass over the rows.
    factor = torch.rsqrt(var + op.eps) if w is None else torch.rsqrt(var + op.eps) * w
    shift = -mean * factor if b is None else torch.addcmul(b, mean, factor, value=-1)
    y, bounds = x.to(kind), offsets.tolist()
    rows = zip(bounds, bounds[1:], factor, shift, strict=False)
    parts = [torch.addcmul(add, y[start:end], times) for start, end, times, add in rows if end > start]
    parts.append(y.new_zeros(y.shape[0] - bounds[-1], y.shape[1]))
    return torch.cat(parts).to(x.dtype)


def _shift(op: Norm, y: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
    if w is not None:
        y = y * (w.to(y.dtype) + op.w_shift)
    return y if b is None else y + b.to(y.dtype)
