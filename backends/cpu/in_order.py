"""Rows that come sorted by expert, one choice each: as mixtures of every expert and dispatch by places hand them over.

R rows, D model width, F expert width, O output width.
"""

from __future__ import annotations

import torch

from moec.backends.cpu.each import Ways, run_one, run_plain
from moec.backends.cpu.operands import Layer
from moec.backends.cpu.slots import Slots


def run_in_order(layer: Layer, ways: Ways, x: torch.Tensor, slots: Slots, weights: torch.Tensor) -> torch.Tensor:
    """x[R, D], slots in order, weights[R, 1] -> [R, O]: rows are read where they lie, and nothing is put back."""
    experts, counts = slots.hit.tolist(), slots.counts.tolist()
    parts = x.split(counts)
    if ways.plain(layer, x.dtype, max(counts)):
        ys = [run_plain(row, layer.activation, part) for row, part in zip(layer.rows(experts), parts, strict=True)]
    else:
        ys = [run_one(layer, ways, e, part, len(part)) for e, part in zip(experts, parts, strict=True)]
    y = torch.cat(ys) if len(ys) > 1 else ys[0]
    if bool((weights == 1).all()):
        return y
    kind = torch.promote_types(y.dtype, weights.dtype)
    return (y.to(kind) * weights.to(kind)).to(x.dtype)
