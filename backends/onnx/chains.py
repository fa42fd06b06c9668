"""Each expert's products one behind the other on its own rows, so that what lies between them stays in the cache.

Sorted rows are otherwise put together behind each product and taken apart again before the next one, which costs
passes over memory where rows are many; here it costs some nodes for each expert, also for those that no token chose.

R rows, E experts, D model width, F expert width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch

from moec.backends.onnx.activations import activate, fused, gated
from moec.backends.onnx.integer import ByteRows, byte_scales, can_defer, middles, product
from moec.backends.onnx.lowering import Groups, Lowering
from moec.backends.onnx.products import parted, together
from moec.ir import ExpertFfn, Value


def can_chain(op: ExpertFfn, low: Lowering, rows: Any) -> bool:
    """Whether the matrices are known now, and are multiplied as they are."""
    matrices = [value for value in (op.w_in, op.w_up, op.w_out) if value is not None]
    alike = isinstance(rows, ByteRows) or (op.scale_in is None and op.scale_out is None)
    return alike and all(low.is_weight(value) for value in matrices)


def chained(op: ExpertFfn, low: Lowering, rows: Any, groups: Groups, kind: str) -> tuple[Any, Any | None]:
    """Rows sorted by expert -> [R, O], and f32[R, 1] where those are still to be multiplied by a scale."""
    experts, outputs = op.w_out.type.shape[0].constant or 0, op.w_out.type.shape[1].constant or 0
    if isinstance(rows, ByteRows):
        return _integer(op, low, rows, groups, experts, outputs)
    parts = parted(low, rows, groups, experts)
    found = [_exact(op, low, parts[e], e, kind) for e in range(experts)]
    return together(low, found, groups, outputs, kind), None


def _firsts(op: ExpertFfn) -> list[tuple[Value, Value | None, Value | None, int | None]]:
    """Matrix, bias, scale and half of it for gate and up; one alone where both lie in turns, or there is no gate."""
    if op.layout in ("concat", "concat_up_first"):
        halves = (0, 1) if op.layout == "concat" else (1, 0)
        return [(op.w_in, op.b_in, op.scale_in, half) for half in halves]
    if op.w_up is None:
        return [(op.w_in, op.b_in, op.scale_in, None)]
    return [(op.w_in, op.b_in, op.scale_in, None), (op.w_up, op.b_up, op.scale_up, None)]


def _part(low: Lowering, value: Value, e: int, half: int | None) -> torch.Tensor:
    whole = low.matrix(value, e)
    return whole if half is None else whole.chunk(2)[half]


def _tensor(low: Lowering, value: Value, e: int, half: int | None, kind: str) -> Any:
    """One expert's matrix or bias, or half of it, in f32 or f64."""
    name = f"{value.name}.{e}" + ("" if half is None else f".{half}")
    found = low.emit.tensor(name, _part(low, value, e, half))
    return found if value.type.dtype == kind else low.emit.cast(found, kind)


def _exact(op: ExpertFfn, low: Lowering, x: Any, e: int, kind: str) -> Any:
    """One expert in floating point: x[r, D] -> [r, O]."""
    emit = low.emit

    def multiply(rows: Any, w: Value, b: Value | None, half: int | None, name: str) -> Any:
        bias = [] if b is None else [_tensor(low, b, e, half, kind)]
        return emit.op("Gemm", rows, _tensor(low, w, e, half, kind), *bias, transB=1, name=f"{name}_{e}")

    first, *more = (multiply(x, w, b, half, "expert") for w, b, _, half in _firsts(op))
    return multiply(_hidden(op, low, first, more, kind), op.w_out, op.b_out, None, "out_of_expert")


def _hidden(op: ExpertFfn, low: Lowering, first: Any, more: list[Any], kind: str) -> Any:
    """The activation of one expert's products: [r, F]."""
    width = op.width(op.w_in).constant or 0
    return gated(low.emit, first, more[0], op, kind, width) if more else fused(low.emit, first, None, op, kind, width)


def _integer(
    op: ExpertFfn, low: Lowering, rows: ByteRows, groups: Groups, experts: int, outputs: int
) -> tuple[Any, Any | None]:
    emit = low.emit
    parts, scales = parted(low, rows.bytes, groups, experts), parted(low, rows.scale, groups, experts)
    zeros = parted(low, middles(emit, emit.op("Squeeze", rows.scale, emit.ints(1))), groups, experts)
    found, factors = [], []
    for e in range(experts):
        y, factor = _rounded(op, low, ByteRows(parts[e], scales[e], rows.bounded), zeros[e], e)
        found.append(y)
        factors.append(factor)
    y = together(low, found, groups, outputs, "f32")
    if op.b_out is not None:
        return y, None
    if groups.left_out is not None:
        factors.append(emit.full(0, "f32", groups.left_out))
    scale = emit.op("Concat", *factors, axis=0, name="scales") if len(factors) > 1 else factors[0]
    scale = emit.op("Unsqueeze", scale, emit.ints(1))
    return y, emit.op("Mul", scale, rows.scale) if can_defer(op) else scale


def _rounded(op: ExpertFfn, low: Lowering, rows: ByteRows, zeros: Any, e: int) -> tuple[Any, Any]:
    """One expert in int8: uint8[r, D] -> f32[r, O], and the scales f32[r] that it lacks where there is no bias.

    Where up was left without the scales of `rows`, the result lacks these as well.
    """
    emit = low.emit
    sums = [_product(low, rows.bytes, w, s, e, half, "expert") for w, _, s, half in _firsts(op)]
    if can_defer(op):
        gate = activate(emit, emit.op("Mul", sums[0], rows.scale), op, "f32")
        hidden = emit.op("Mul", gate, sums[1], name="activated")
    else:
        first, *more = (
            _shifted(low, emit.op("Mul", y, rows.scale), b, e, half)
            for y, (_, b, _, half) in zip(sums, _firsts(op), strict=True)
        )
        hidden = _hidden(op, low, first, more, "f32")
    scale = byte_scales(emit, hidden, growth=None, finite=rows.bounded)
    small = emit.op("QuantizeLinear", hidden, scale, zeros, axis=0, name="bytes")
    y = _product(low, small, op.w_out, op.scale_out, e, None, "out_of_expert")
    if op.b_out is None:
        return y, scale
    every = emit.op("Unsqueeze", scale, emit.ints(1))
    every = emit.op("Mul", every, rows.scale) if can_defer(op) else every
    return _shifted(low, emit.op("Mul", y, every), op.b_out, e, None), scale


def _product(low: Lowering, rows: Any, w: Value, s: Value | None, e: int, half: int | None, name: str) -> Any:
    assert s is not None, "rows are rounded to int8 for i8 weights"
    return product(low, rows, _part(low, w, e, half), _part(low, s, e, half), f"{name}_{e}")


def _shifted(low: Lowering, y: Any, b: Value | None, e: int, half: int | None) -> Any:
    return y if b is None else low.emit.op("Add", y, _tensor(low, b, e, half, "f32"))
