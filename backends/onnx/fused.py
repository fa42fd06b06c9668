"""Whole layers as ONNX nodes: rows sorted by expert, a product for each expert, and each token's rows summed.

T tokens, K experts per token, E experts, D model width, F expert width, O output width, R = T*K rows.
"""

from __future__ import annotations

from typing import Any

from moec.backends.onnx import activations, own_moe
from moec.backends.onnx.chains import can_chain, chained
from moec.backends.onnx.combining import sum_slots
from moec.backends.onnx.grouping import count_rows, expert_keys, gather, groups_of, sort
from moec.backends.onnx.integer import ByteRows, can_defer, gated_integer, growth, unscaled
from moec.backends.onnx.lowering import Groups, Lowering, wide_dtype
from moec.backends.onnx.products import dense, grouped, in_integers
from moec.ir import DenseFfn, ExpertFfn, ExpertGlu, Gather
from moec.ir.ops_fused import FusedActivation


def expert_ffn(op: ExpertFfn, low: Lowering) -> list[Any]:
    emit = low.emit
    if low.form.experts != "sorted":
        return [own_moe.expert_ffn(op, low)]
    experts = op.w_in.type.shape[0].constant or 0
    kind = wide_dtype(op.x.type.dtype)
    keys, inside = expert_keys(low, op.experts, experts)
    groups = count_rows(low, keys, experts, all_inside=inside is None)
    rows_shape = emit.op("Shape", keys)
    order = sort(emit, keys, rows_shape)
    k = op.experts.type.shape[1].constant
    slots = emit.number(k) if k is not None else emit.shape_of(low.value(op.experts), 1)
    token = order if k == 1 else emit.op("Div", order, slots, name="token_of_row")
    x = low.wide(op.x)
    if in_integers(low, op.scale_in, kind):
        rows = ByteRows.of(emit, x, growth=growth(op, low)).gather(emit, token)
        rows = rows if inside is None else rows.only(emit, emit.op("Gather", inside, order, axis=0))
    else:
        rows = emit.op("Gather", x, token, axis=0, name="rows")
    if low.form.chained and can_chain(op, low, rows):
        y, scale = chained(op, low, rows, groups, kind)
    else:
        y, scale = _results(op, low, _activated(op, low, rows, groups, kind), groups, kind)
    total = _weighted(op, low, y, scale, order, inside, kind)
    return [low.rounded(total, op.x.type.dtype, wide_dtype(op.x.type.dtype, op.weights.type.dtype))]


def _activated(op: ExpertFfn, low: Lowering, rows: Any, groups: Groups, kind: str) -> Any:
    """rows[R, D] -> [R, F], rounded to int8 where that saves a pass."""
    if isinstance(rows, ByteRows) and op.scale_out is not None and can_defer(op):
        return gated_integer(op, low, rows, groups)
    h = grouped(low, rows, groups, op.w_in, op.b_in, op.scale_in, kind)
    u = None if op.w_up is None else grouped(low, rows, groups, op.w_up, op.b_up, op.scale_up, kind)
    return activations.fused(low.emit, h, u, op, kind, _width(op, op.w_in.type.shape[1].constant))


def _results(op: ExpertFfn, low: Lowering, a: Any, groups: Groups, kind: str) -> tuple[Any, Any | None]:
    """a[R, F] -> [R, O], and the scales f32[R, 1] of its rows, which then go to the routers' weights."""
    if isinstance(a, ByteRows) and op.b_out is None and op.scale_out is not None:
        return unscaled(low, a, groups, op.w_out, op.scale_out), a.scale
    return grouped(low, a, groups, op.w_out, op.b_out, op.scale_out, kind), None


def _width(op: FusedActivation, outputs: int | None) -> int:
    """F, where a matrix with this many outputs may hold gate and up."""
    assert outputs is not None
    return outputs if op.layout in ("none", "pair") else outputs // 2


def _weighted(
    op: ExpertFfn, low: Lowering, y: Any, scale: Any | None, order: Any, inside: Any | None, kind: str
) -> Any:
    """y[R, O] in the order of experts -> [T, O]. Rows of no expert are zeros, and their weights may be anything."""
    emit = low.emit
    total = wide_dtype(op.x.type.dtype, op.weights.type.dtype)
    weights = low.wide(op.weights)
    if op.weights.type.dtype != total and op.weights.type.dtype == "f32":
        weights = emit.cast(weights, total)
    y = y if kind == total else emit.cast(y, total)
    count = emit.op("Squeeze", emit.op("Shape", order), emit.ints(0))
    place = emit.op("ScatterElements", order, order, emit.range(count), axis=0, name="row_of_slot")
    factors = emit.reshape(weights, -1, 1)
    if scale is not None:
        scale = scale if total == "f32" else emit.cast(scale, total)
        factors = emit.op("Mul", factors, emit.op("Gather", scale, place, axis=0, name="scale_of_slot"))
    if inside is not None:
        factors = emit.op("Where", emit.op("Unsqueeze", inside, emit.ints(1)), factors, emit.scalar(0, total))
    mine = emit.op("Gather", y, place, axis=0, name="rows_of_token")
    part = emit.op("Mul", mine, factors, name="weighted")
    width = op.w_out.type.shape[1].constant
    assert width is not None
    return sum_slots(low, part, weights, width)


def expert_glu(op: ExpertGlu, low: Lowering) -> list[Any]:
    emit, kind = low.emit, wide_dtype(op.x.type.dtype)
    rows = gather(Gather(op.x, op.order, k=op.k), low)[0]
    rows = emit.cast(rows, "f32") if op.x.type.dtype in ("f16", "bf16") else rows
    groups = groups_of(low, rows, op.offsets, op.w.type.shape[0].constant or 0)
    h = grouped(low, rows, groups, op.w, op.b, op.scale, kind)
    u = None if op.w_up is None else grouped(low, rows, groups, op.w_up, op.b_up, op.scale_up, kind)
    a = activations.fused(emit, h, u, op, kind, _width(op, op.w.type.shape[1].constant))
    if groups.left_out is not None and not _zero_at_zero(op):
        count = emit.shape_of(rows, 0)
        held = emit.op("Less", emit.range(count), emit.op("Sub", count, groups.left_out))
        a = emit.op("Where", emit.op("Unsqueeze", held, emit.ints(1)), a, emit.scalar(0, kind))
    return [low.rounded(a, op.x.type.dtype)]


def _zero_at_zero(op: ExpertGlu) -> bool:
    return op.fn not in ("sigmoid", "softplus")


def dense_ffn(op: DenseFfn, low: Lowering) -> list[Any]:
    kind, rank = wide_dtype(op.x.type.dtype), op.x.type.rank
    x = low.wide(op.x)
    h = dense(low, x, op.w_in, op.b_in, op.scale_in, kind, rank=rank)
    u = None if op.w_up is None else dense(low, x, op.w_up, op.b_up, op.scale_up, kind, rank=rank)
    a = activations.fused(low.emit, h, u, op, kind, _width(op, op.w_in.type.shape[0].constant))
    return [low.rounded(dense(low, a, op.w_out, op.b_out, op.scale_out, kind, rank=rank), op.x.type.dtype)]
