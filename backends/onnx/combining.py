"""From the experts' rows back to tokens, as ONNX nodes.

T tokens, K experts per token, E experts, D width, R rows, C capacity.
"""

from __future__ import annotations

from typing import Any

from moec.backends.onnx.lowering import Lowering, wide_dtype
from moec.ir import Combine, CombineDense, DispatchDense, IdentityRows, KeptWeights, ScaleRows, Value


def combine(op: Combine, low: Lowering) -> list[Any]:
    kind = wide_dtype(op.rows.type.dtype, op.weights.type.dtype)
    rows, weights = _as(low, op.rows, kind), _as(low, op.weights, kind)
    order = low.emit.cast(low.value(op.order), "i64")
    if op.tokens is not None:
        found = _combine_chosen(low, rows, order, weights, low.emit.size_value(op.tokens), op.rows, kind)
    else:
        found = _combine_slots(low, rows, order, weights, kind)
    return [low.rounded(found, op.rows.type.dtype, kind)]


def _as(low: Lowering, value: Value, kind: str) -> Any:
    found = low.value(value)
    return found if value.type.dtype == kind else low.emit.cast(found, kind)


def _combine_slots(low: Lowering, rows: Any, order: Any, weights: Any, kind: str) -> Any:
    """Each token's slots in the order 0..K-1."""
    emit = low.emit
    count = emit.op("Squeeze", emit.op("Shape", order), emit.ints(0))
    one_more = emit.op("Add", count, emit.number(1))
    none = emit.op("Expand", emit.number(-1), emit.vector(one_more))
    # Rows of no slot land in the last place, which no token reads.
    slot = emit.op("Where", emit.op("Less", order, emit.number(0)), count, order)
    place = emit.op("ScatterElements", none, slot, emit.range(count), axis=0, name="row_of_slot")
    place = emit.op("Slice", place, emit.ints(0), emit.vector(count), emit.ints(0))
    missing = emit.op("Unsqueeze", emit.op("Less", place, emit.number(0)), emit.ints(1))
    mine = emit.op("Gather", rows, emit.op("Max", place, emit.number(0)), axis=0)
    part = emit.op("Mul", mine, emit.reshape(weights, -1, 1))
    part = emit.op("Where", missing, emit.scalar(0, kind), part)
    return sum_slots(low, part, weights, emit.shape_of(rows, 1))


def sum_slots(low: Lowering, part: Any, weights: Any, width: Any) -> Any:
    """part[T*K, D] -> [T, D]: the sum of each token's K rows."""
    emit = low.emit
    shape = emit.op("Concat", emit.op("Shape", weights), emit.vector(width), axis=0)
    return emit.op("ReduceSum", emit.op("Reshape", part, shape, allowzero=1), emit.ints(1), keepdims=0, name="combined")


def _combine_chosen(low: Lowering, rows: Any, order: Any, weights: Any, tokens: Any, rv: Value, kind: str) -> Any:
    """Rows of expert choice, added to their tokens in ascending order; entries of -1 to a row that nobody reads."""
    emit = low.emit
    width = emit.shape_of(rows, 1)
    token = emit.op("Where", emit.op("Less", order, emit.number(0)), tokens, order)
    where = emit.op("Expand", emit.op("Unsqueeze", token, emit.ints(1)), emit.op("Shape", rows))
    part = emit.op("Mul", rows, emit.reshape(weights, -1, 1))
    empty = emit.full(0, kind, emit.op("Add", tokens, emit.number(1)), width)
    total = emit.op("ScatterElements", empty, where, part, axis=0, reduction="add", name="combined")
    return emit.op("Slice", total, emit.ints(0), emit.vector(tokens), emit.ints(0))


def kept_weights(op: KeptWeights, low: Lowering) -> list[Any]:
    emit, dtype = low.emit, op.weights.type.dtype
    kind = wide_dtype(dtype, dtype)
    order, weights = emit.cast(low.value(op.order), "i64"), _as(low, op.weights, kind)
    count = emit.op("Squeeze", emit.op("Shape", order), emit.ints(0))
    none = emit.full(0, "i32", emit.op("Add", count, emit.number(1)))
    # Rows of no slot land in the last place.
    slot = emit.op("Where", emit.op("Less", order, emit.number(0)), count, order)
    kept = emit.op("ScatterElements", none, slot, emit.full(1, "i32", count), axis=0, name="kept")
    kept = emit.op("Slice", kept, emit.ints(0), emit.vector(count), emit.ints(0))
    mask = emit.op("Reshape", emit.cast(kept, "bool"), emit.op("Shape", weights), allowzero=1)
    left = emit.op("Where", mask, weights, emit.scalar(0, kind))
    if op.normalize != "none":
        total = emit.op("ReduceSum", left, emit.ints(1), keepdims=1)
        least = emit.scalar(op.eps, kind)
        left = emit.op("Div", left, emit.op("Add" if op.normalize == "sum" else "Max", total, least))
    return [low.rounded(left, dtype, kind)]


def scale_rows(op: ScaleRows, low: Lowering) -> list[Any]:
    emit, dtype = low.emit, op.rows.type.dtype
    order = emit.cast(low.value(op.order), "i64")
    flat = emit.reshape(_as(low, op.weights, dtype), -1)
    if op.by == "token":
        flat = emit.op("Gather", flat, emit.op("Max", order, emit.number(0)), axis=0)
    wide = "f32" if dtype in ("f16", "bf16") else dtype
    left, right = (emit.cast(one, wide) if wide != dtype else one for one in (low.value(op.rows), flat))
    scaled = low.rounded(emit.op("Mul", left, emit.op("Unsqueeze", right, emit.ints(1))), dtype)
    missing = emit.op("Unsqueeze", emit.op("Less", order, emit.number(0)), emit.ints(1))
    return [emit.zero_where(missing, scaled, dtype)]


def identity_rows(op: IdentityRows, low: Lowering) -> list[Any]:
    emit = low.emit
    kind = wide_dtype(op.x.type.dtype, op.weights.type.dtype)
    ids = emit.cast(low.value(op.ids), "i64")
    from_first = emit.op("GreaterOrEqual", ids, emit.number(op.first))
    mine = emit.op("And", from_first, emit.op("Less", ids, emit.number(op.first + op.count)))
    weights = emit.op("Where", mine, _as(low, op.weights, kind), emit.scalar(0, kind))
    total = emit.op("ReduceSum", weights, emit.ints(1), keepdims=1)
    return [low.rounded(emit.op("Mul", _as(low, op.x, kind), total), op.x.type.dtype, kind)]


def dispatch_dense(op: DispatchDense, low: Lowering) -> list[Any]:
    emit = low.emit
    kind = wide_dtype(op.x.type.dtype, op.weights.type.dtype)
    mix = _as(low, op.weights, kind)
    mix = emit.op("Softmax", mix, axis=0) if op.softmax else mix
    tokens, experts, places = (emit.size(size) for size in op.weights.type.shape)
    many = _times(low, experts, places)
    flat = emit.reshape(mix, tokens, many)
    rows = emit.op("MatMul", emit.op("Transpose", flat, perm=[1, 0]), _as(low, op.x, kind))
    ends = emit.op("Mul", emit.range(_plus_one(low, experts)), _scalar(low, places))
    return [low.rounded(rows, op.x.type.dtype, kind), emit.cast(ends, "i32")]


def combine_dense(op: CombineDense, low: Lowering) -> list[Any]:
    emit = low.emit
    kind = wide_dtype(op.rows.type.dtype, op.weights.type.dtype)
    tokens, experts, places = (emit.size(size) for size in op.weights.type.shape)
    mix = emit.reshape(_as(low, op.weights, kind), tokens, _times(low, experts, places))
    mix = emit.op("Softmax", mix, axis=1) if op.softmax else mix
    return [low.rounded(emit.op("MatMul", mix, _as(low, op.rows, kind)), op.rows.type.dtype, kind)]


def _scalar(low: Lowering, size: Any) -> Any:
    return low.emit.number(size) if isinstance(size, int) else size


def _times(low: Lowering, a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    return low.emit.op("Mul", _scalar(low, a), _scalar(low, b))


def _plus_one(low: Lowering, size: Any) -> Any:
    return low.emit.op("Add", _scalar(low, size), low.emit.number(1))
