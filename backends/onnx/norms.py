"""Normalisation of rows as ONNX nodes. R rows, E experts, D width."""

from __future__ import annotations

from typing import Any

from moec.backends.onnx.grouping import groups_of
from moec.backends.onnx.lowering import Lowering, wide_dtype
from moec.backends.onnx.products import parted, together
from moec.ir import BatchNorm, Norm, Value


def norm(op: Norm, low: Lowering) -> list[Any]:
    emit, kind = low.emit, wide_dtype(op.x.type.dtype)
    y = low.wide(op.x)
    if op.kind == "layer":
        y = emit.op("Sub", y, emit.op("ReduceMean", y, emit.ints(-1), keepdims=1))
    if op.kind != "none":
        mean = emit.op("ReduceMean", emit.op("Mul", y, y), emit.ints(-1), keepdims=1)
        y = emit.op("Div", y, emit.op("Sqrt", emit.op("Add", mean, emit.scalar(op.eps, kind))))
    if op.offsets is None:
        w = None if op.w is None else _as(low, low.value(op.w), op.w, kind)
        b = None if op.b is None else _as(low, low.value(op.b), op.b, kind)
        return [low.rounded(_shift(op, low, y, w, b, kind), op.x.type.dtype)]
    one = op.w or op.b
    assert one is not None
    experts, width = one.type.shape[0].constant or 0, one.type.shape[1].constant or 0
    groups = groups_of(low, y, op.offsets, experts)
    parts = parted(low, y, groups, experts)
    found = []
    for e in range(experts):
        w = None if op.w is None else _as(low, low.expert(op.w, e), op.w, kind)
        b = None if op.b is None else _as(low, low.expert(op.b, e), op.b, kind)
        found.append(_shift(op, low, parts[e], w, b, kind))
    return [low.rounded(together(low, found, groups, width, kind), op.x.type.dtype)]


def batch_norm(op: BatchNorm, low: Lowering) -> list[Any]:
    emit, kind = low.emit, wide_dtype(op.x.type.dtype)
    experts, width = op.mean.type.shape[0].constant or 0, op.mean.type.shape[1].constant or 0
    rows = low.wide(op.x)
    groups = groups_of(low, rows, op.offsets, experts)
    parts = parted(low, rows, groups, experts)
    found = []
    for e in range(experts):
        mean, var = (_as(low, low.expert(value, e), value, kind) for value in (op.mean, op.var))
        w, b = (None if v is None else _as(low, low.expert(v, e), v, kind) for v in (op.w, op.b))
        y = emit.op(
            "Div", emit.op("Sub", parts[e], mean), emit.op("Sqrt", emit.op("Add", var, emit.scalar(op.eps, kind)))
        )
        y = y if w is None else emit.op("Mul", y, w)
        found.append(y if b is None else emit.op("Add", y, b))
    return [low.rounded(together(low, found, groups, width, kind), op.x.type.dtype)]


def _as(low: Lowering, found: Any, value: Value, kind: str) -> Any:
    return found if value.type.dtype == kind else low.emit.cast(found, kind)


def _shift(op: Norm, low: Lowering, y: Any, w: Any | None, b: Any | None, kind: str) -> Any:
    emit = low.emit
    if w is not None:
        w = w if op.w_shift == 0 else emit.op("Add", w, emit.scalar(op.w_shift, kind))
        y = emit.op("Mul", y, w)
    return y if b is None else emit.op("Add", y, b)
