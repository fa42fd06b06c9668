"""Matrix products as ONNX nodes: one for each expert, on its rows.

R rows, C inputs, N outputs, E experts, G groups of a row that share a scale. Sums are kept in f32 (f64 for f64). Gemm
takes the matrices [N, C] as they lie in the model.
"""

from __future__ import annotations

from typing import Any

from moec.backends.onnx.grouping import groups_of
from moec.backends.onnx.integer import ByteRows, grouped_integer, integer_linear, quantize
from moec.backends.onnx.lowering import Groups, Lowering, wide_dtype
from moec.ir import GroupedLinear, Linear, QuantizeRows, Value


def linear(op: Linear, low: Lowering) -> list[Any]:
    dtype = op.dtype or op.x.type.dtype
    if op.x_scale is not None:
        found = _int8_rows(low, low.value(op.x), low.value(op.x_scale), op.x_scale, op.w, op.scale, None)
        if op.b is not None:
            found = low.emit.op("Add", found, _as(low, low.value(op.b), op.b, "f32"))
        return [low.rounded(found, dtype, "f32")]
    kind = wide_dtype(op.x.type.dtype)
    found = dense(low, low.wide(op.x), op.w, op.b, op.scale, kind, rank=op.x.type.rank)
    return [low.rounded(found, dtype, kind)]


def dense(low: Lowering, x: Any, w: Value, b: Value | None, scale: Value | None, kind: str, *, rank: int) -> Any:
    """x[..., C] in f32 or f64 with `rank` sizes, w[N, C] -> [..., N], not rounded."""
    emit = low.emit
    if in_integers(low, scale, kind):
        assert scale is not None
        return integer_linear(low, x, w, b, scale, rank=rank)
    matrix = widened(low, low.value(w), w, scale, None, kind)
    bias = None if b is None else _as(low, low.value(b), b, kind)
    if rank == 2:
        return emit.op("Gemm", x, matrix, *([] if bias is None else [bias]), transB=1, name="product")
    found = emit.op("MatMul", x, emit.op("Transpose", matrix, perm=[1, 0]), name="product")
    return found if bias is None else emit.op("Add", found, bias)


def grouped_linear(op: GroupedLinear, low: Lowering) -> list[Any]:
    dtype = op.dtype or op.rows.type.dtype
    groups = groups_of(low, low.value(op.rows), op.offsets, op.w.type.shape[0].constant or 0)
    if op.x_scale is not None:
        return [low.rounded(_grouped_int8(op, low, groups), dtype, "f32")]
    kind = wide_dtype(op.rows.type.dtype)
    return [low.rounded(grouped(low, low.wide(op.rows), groups, op.w, op.b, op.scale, kind), dtype, kind)]


def grouped(low: Lowering, rows: Any, groups: Groups, w: Value, b: Value | None, scale: Value | None, kind: str) -> Any:
    """rows[R, C] in f32 or f64, sorted by expert -> [R, N], not rounded; rows of no expert come out as zeros."""
    if isinstance(rows, ByteRows):
        assert scale is not None, "rows are rounded to int8 for i8 weights"
        return grouped_integer(low, rows, groups, w, b, scale)
    if in_integers(low, scale, kind):
        assert scale is not None
        return grouped_integer(low, ByteRows.of(low.emit, rows), groups, w, b, scale)
    emit = low.emit
    experts, outputs = _counted(w)
    parts = parted(low, rows, groups, experts)
    found = []
    for e in range(experts):
        matrix = widened(low, low.expert(w, e), w, scale, e, kind)
        bias = [] if b is None else [_as(low, low.expert(b, e), b, kind)]
        found.append(emit.op("Gemm", parts[e], matrix, *bias, transB=1, name=f"expert_{e}"))
    return together(low, found, groups, outputs, kind)


def in_integers(low: Lowering, scale: Value | None, kind: str) -> bool:
    """Whether a product with these weights is taken in int8."""
    return scale is not None and low.form.products in ("integer", "integer_to_float") and kind == "f32"


def parted(low: Lowering, rows: Any, groups: Groups, experts: int) -> list[Any]:
    """The rows of each expert, and behind them those of none, where there are any."""
    emit = low.emit
    if groups.left_out is not None:
        return list(emit.op_many("Split", experts + 1, rows, groups.counts, axis=0, name="rows_of_expert"))
    if experts == 1:
        return [rows]
    counts = emit.op("Slice", groups.counts, emit.ints(0), emit.ints(experts), emit.ints(0))
    return list(emit.op_many("Split", experts, rows, counts, axis=0, name="rows_of_expert"))


def together(low: Lowering, parts: list[Any], groups: Groups, outputs: int, kind: str) -> Any:
    """[R, N] of the experts' results, and zeros behind them for rows of no expert."""
    emit = low.emit
    if groups.left_out is not None:
        parts = [*parts, emit.full(0, kind, groups.left_out, outputs)]
    return parts[0] if len(parts) == 1 else emit.op("Concat", *parts, axis=0, name="results")


def widened(low: Lowering, found: Any, w: Value, scale: Value | None, e: int | None, kind: str) -> Any:
    """A matrix [N, C] in f32 or f64; i8 times its scale."""
    if scale is None:
        return _as(low, found, w, kind)
    emit = low.emit
    factors = low.value(scale) if e is None else low.expert(scale, e)
    factors = factors if kind == "f32" else emit.cast(factors, kind)
    return emit.op("Mul", emit.cast(found, kind), emit.op("Unsqueeze", factors, emit.ints(1)), name="matrix")


def _as(low: Lowering, found: Any, value: Value, kind: str) -> Any:
    return found if value.type.dtype == kind else low.emit.cast(found, kind)


def _counted(w: Value) -> tuple[int, int]:
    experts, outputs = w.type.shape[0].constant, w.type.shape[1].constant
    assert experts is not None
    assert outputs is not None
    return experts, outputs


def quantize_rows(op: QuantizeRows, low: Lowering) -> list[Any]:
    """Symmetric, one scale for each of `groups` equal parts of a row."""
    emit, width = low.emit, op.x.type.shape[-1].constant or 0
    shape = emit.op("Shape", low.value(op.x))
    outer = emit.op("Slice", shape, emit.ints(0), emit.ints(-1), emit.ints(0))
    parts = emit.op("Concat", outer, emit.ints(op.groups, width // op.groups), axis=0)
    x = low.wide(op.x)
    x = emit.cast(x, "f32") if op.x.type.dtype == "f64" else x
    q, scale = quantize(emit, emit.op("Reshape", x, parts, allowzero=1), op.x.type.rank)
    back = emit.op("Reshape", emit.cast(q, "i8"), shape, allowzero=1)
    return [back, emit.op("Squeeze", scale, emit.ints(-1))]


def _int8_rows(low: Lowering, x: Any, x_scale: Any, xs: Value, w: Value, scale: Value | None, e: int | None) -> Any:
    """i8 rows times i8 weights [N, C] -> f32 [..., N]: the sum over groups of x_scale times the group's exact sum."""
    emit = low.emit
    assert scale is not None
    factors = low.value(scale) if e is None else low.expert(scale, e)
    matrix = low.value(w) if e is None else low.expert(w, e)
    groups = xs.type.shape[-1].constant or 1
    width = (w.type.shape[-1].constant or 0) // groups
    total = None
    for g in range(groups):
        start, end, last = emit.ints(g * width), emit.ints((g + 1) * width), emit.ints(-1)
        left = emit.cast(emit.op("Slice", x, start, end, last), "f64")
        right = emit.cast(emit.op("Slice", matrix, start, end, last), "f64")
        # Products of i8 summed in f64 are exact.
        sums = emit.cast(emit.op("MatMul", left, emit.op("Transpose", right, perm=[1, 0])), "f32")
        term = emit.op("Mul", sums, emit.op("Slice", x_scale, emit.ints(g), emit.ints(g + 1), last))
        total = term if total is None else emit.op("Add", total, term)
    return emit.op("Mul", total, factors)


def _grouped_int8(op: GroupedLinear, low: Lowering, groups: Groups) -> Any:
    assert op.x_scale is not None
    experts, outputs = _counted(op.w)
    rows = parted(low, low.value(op.rows), groups, experts)
    scales = parted(low, low.value(op.x_scale), groups, experts)
    found = []
    for e in range(experts):
        y = _int8_rows(low, rows[e], scales[e], op.x_scale, op.w, op.scale, e)
        found.append(y if op.b is None else low.emit.op("Add", y, _as(low, low.expert(op.b, e), op.b, "f32")))
    return together(low, found, groups, outputs, "f32")
