"""Products of int8 weights with rows that are rounded to int8 as they come: what `--quantize int8` runs.

R rows, C inputs, N outputs, E experts. Every row has a scale of its own, so a token's result does not depend on the
others. Rows are sent as uint8 around 128, because ONNX Runtime has no fast product of signed with signed on x86.
MatMulIntegerToFloat writes f32 times the weights' scales at once, where the standard op leaves two more passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from moec.backends.onnx.emitter import Emitter
from moec.backends.onnx.lowering import Groups, Lowering
from moec.backends.onnx.own_moe import DOMAIN
from moec.ir import ExpertFfn, Value


def row_scales(emit: Emitter, x: Any, last: int) -> Any:
    """x[..., C] f32 -> f32[..., 1]: the largest number of a row becomes 127.

    `last` is the last axis by its number: over -1, ONNX Runtime's reductions give [0, C] where there are no rows.
    """
    most = emit.op("ReduceMax", emit.op("Abs", x), emit.ints(last), keepdims=1)
    zero = emit.op("Equal", most, emit.scalar(0, "f32"))
    # Only a row of zeros has no scale of its own.
    scale = emit.op("Where", zero, emit.scalar(1, "f32"), emit.op("Div", most, emit.scalar(127, "f32")), name="scale")
    # A row with a not-a-number has none as its scale either, which ReduceMax may overlook; 0 is added to all others.
    sums = emit.op("ReduceSum", x, emit.ints(last), keepdims=1)
    return emit.op("Add", scale, emit.op("Mul", sums, emit.scalar(0, "f32")))


def quantize(emit: Emitter, x: Any, last: int) -> tuple[Any, Any]:
    """x[..., C] f32 -> whole numbers in -127..127 as f32 [..., C], scale f32[..., 1]: symmetric, half to even."""
    scale = row_scales(emit, x, last)
    return emit.op("Round", emit.op("Div", x, scale), name="rounded"), scale


# A row whose numbers are all smaller than this becomes zeros.
LEAST_ROW = 1e-37


def byte_scales(emit: Emitter, rows: Any, *, growth: float | None, finite: bool = False) -> Any:
    """rows[R, C] f32 -> f32[R]: the largest number of a row becomes 127.

    `finite`: no number here is infinite or not a number, so that need not be looked for. `growth`: what is computed
    from a row is at most its scale times this; where that may overflow the row's scale is not a number.
    """
    most = emit.op("ReduceMax", emit.op("Abs", rows), emit.ints(1), keepdims=0)
    scale = emit.op("Div", emit.op("Max", most, emit.scalar(LEAST_ROW, "f32")), emit.scalar(127, "f32"), name="scale")
    if finite:
        return scale
    # ReduceMax may overlook what is not a number; 0 is added to the scales of all other rows.
    odd = emit.op("ReduceSum", rows, emit.ints(1), keepdims=0)
    if growth is not None:
        odd = emit.op("Add", odd, emit.op("Mul", scale, emit.scalar(growth, "f32")))
    return emit.op("Add", scale, emit.op("Mul", odd, emit.scalar(0, "f32")))


def middles(emit: Emitter, scales: Any) -> Any:
    """A zero point for each row, uint8[R]."""
    return emit.op("Expand", emit.constant(np.array(128, dtype=np.uint8), "middle"), emit.op("Shape", scales))


def as_bytes(emit: Emitter, rows: Any, *, growth: float | None = None, finite: bool = False) -> tuple[Any, Any]:
    """rows[R, C] f32 -> uint8[R, C] around 128, scale f32[R, 1]: symmetric, half to even; see `byte_scales`."""
    scale = byte_scales(emit, rows, growth=growth, finite=finite)
    found = emit.op("QuantizeLinear", rows, scale, middles(emit, scale), axis=0, name="bytes")
    return found, emit.op("Unsqueeze", scale, emit.ints(1))


def product(low: Lowering, rows: Any, matrix: torch.Tensor, scale: torch.Tensor, name: str) -> Any:
    """rows uint8[R, C], i8[N, C], f32[N] -> f32[R, N], without the rows' scales."""
    emit = low.emit
    w = emit.tensor(f"{name}.weight", matrix.T)
    middle = emit.constant(np.array(128, dtype=np.uint8), "middle")
    factors = emit.tensor(f"{name}.scale", scale)
    if low.form.products == "integer_to_float":
        one = emit.scalar(1, "f32")
        return emit.op("MatMulIntegerToFloat", rows, w, one, factors, middle, name=name, domain=DOMAIN)
    sums = emit.cast(emit.op("MatMulInteger", rows, w, middle, name=name), "f32")
    return emit.op("Mul", sums, factors)


@dataclass(frozen=True)
class ByteRows:
    """Rows rounded to int8: uint8[R, C] around 128, and the scale of each, f32[R, 1]."""

    bytes: Any
    scale: Any
    bounded: bool = False
    """What lies between the products is finite where the scale is."""

    @classmethod
    def of(cls, emit: Emitter, rows: Any, *, growth: float | None = None, finite: bool = False) -> ByteRows:
        return cls(*as_bytes(emit, rows, growth=growth, finite=finite), bounded=growth is not None)

    def gather(self, emit: Emitter, token: Any) -> ByteRows:
        """Those of the tokens named, each token rounded once however many experts it goes to."""
        found = emit.op("Gather", self.bytes, token, axis=0, name="rows")
        return ByteRows(found, emit.op("Gather", self.scale, token, axis=0, name="scales"), self.bounded)

    def only(self, emit: Emitter, kept: Any) -> ByteRows:
        """The same with a scale of 0 where not kept[R], so that zeros stay zeros whatever the row is."""
        kept = emit.op("Unsqueeze", kept, emit.ints(1))
        return replace(self, scale=emit.op("Where", kept, self.scale, emit.scalar(0, "f32")))


def grouped_integer(low: Lowering, rows: ByteRows, groups: Groups, w: Value, b: Value | None, scale: Value) -> Any:
    """Rows sorted by expert -> f32[R, N]; rows of no expert come out as zeros."""
    sums = low.emit.op("Mul", unscaled(low, rows, groups, w, scale), rows.scale)
    experts = w.type.shape[0].constant or 0
    return sums if b is None else low.emit.op("Add", sums, _biases(low, b, groups, experts))


def unscaled(low: Lowering, rows: ByteRows, groups: Groups, w: Value, scale: Value) -> Any:
    """Rows sorted by expert -> f32[R, N], without the rows' scales."""
    from moec.backends.onnx.products import parted, together  # which chooses between this and exact products

    experts, outputs = w.type.shape[0].constant or 0, w.type.shape[1].constant or 0
    parts = parted(low, rows.bytes, groups, experts)
    found = [product(low, parts[e], low.matrix(w, e), low.matrix(scale, e), f"expert_{e}") for e in range(experts)]
    return together(low, found, groups, outputs, "f32")


def can_defer(op: ExpertFfn) -> bool:
    """Whether up may be left without its rows' scales, which then go to the rows behind the activation."""
    no_bias = op.b_in is None and op.b_up is None
    return op.layout in ("pair", "concat", "concat_up_first") and op.limit is None and op.up_shift == 0 and no_bias


# Of these, none is larger than what it is given.
SHRINKING = ("silu", "quick_gelu", "gelu", "gelu_tanh", "relu", "identity", "tanh")


def growth(op: ExpertFfn, low: Lowering) -> float | None:
    """How many times a row's scale what lies between the products is at most, before up's own scale; None for no bound.

    Rows that may overflow get a scale that is not a number when they are rounded first, so that the rows between the
    products, which are many more numbers, need not be searched for it.
    """
    if not can_defer(op) or op.fn not in SHRINKING:
        return None
    pairs = [(op.w_in, op.scale_in), (op.w_up, op.scale_up)]
    # -128 stays so in int8, and is 128 as the byte it is.
    peaks = [
        127 * float((q.abs().view(torch.uint8).sum(1, dtype=torch.float32) * factors.float()).max())
        for w, scale in pairs
        if w is not None and scale is not None
        for q, factors in ((low.matrix(w, e), low.matrix(scale, e)) for e in range(w.type.shape[0].constant or 0))
    ]
    if not all(peak < 1e15 for peak in peaks):
        return None
    return max(1.0, *peaks) ** 2


def gated_integer(op: ExpertFfn, low: Lowering, rows: ByteRows, groups: Groups) -> ByteRows:
    """rows -> act(gate) * up, rounded anew: up's factor for each row goes into the new scale."""
    from moec.backends.onnx.activations import activate, split

    emit = low.emit
    assert op.scale_in is not None
    if op.w_up is not None and op.scale_up is not None:
        gate = unscaled(low, rows, groups, op.w_in, op.scale_in)
        up = unscaled(low, rows, groups, op.w_up, op.scale_up)
    else:
        both = unscaled(low, rows, groups, op.w_in, op.scale_in)
        gate, up = split(emit, both, op.layout, (op.w_in.type.shape[1].constant or 0) // 2)
    gate = activate(emit, emit.op("Mul", gate, rows.scale), op, "f32")
    hidden = emit.op("Mul", gate, up, name="activated")
    found = ByteRows.of(emit, hidden, finite=rows.bounded)
    return ByteRows(found.bytes, emit.op("Mul", found.scale, rows.scale))


def _biases(low: Lowering, b: Value, groups: Groups, experts: int) -> Any:
    """b[E, N] -> the bias of each row, f32[R, N]; none for rows of no expert."""
    emit = low.emit
    every = low.wide(b)
    every = emit.cast(every, "f32") if b.type.dtype == "f64" else every
    if groups.left_out is not None:
        every = emit.op("Concat", every, emit.full(0, "f32", 1, b.type.shape[1].constant or 0), axis=0)
        experts += 1
    # Row r belongs to the expert whose part it is in: as many as end at or before r.
    ends = emit.op("CumSum", groups.counts, emit.number(0))
    total = emit.op("ReduceSum", groups.counts, emit.ints(0), keepdims=0)
    places = emit.op("Unsqueeze", emit.range(total), emit.ints(1))
    before = emit.cast(emit.op("LessOrEqual", emit.op("Unsqueeze", ends, emit.ints(0)), places), "i64")
    return emit.op("Gather", every, emit.op("ReduceSum", before, emit.ints(1), keepdims=0), axis=0)


def integer_linear(low: Lowering, x: Any, w: Value, b: Value | None, scale: Value, *, rank: int) -> Any:
    """x f32[..., C] with `rank` sizes, w i8[N, C] -> f32[..., N]."""
    from moec.backends.reference.joined import whole

    emit = low.emit
    inputs, outputs = w.type.shape[1].constant or 0, w.type.shape[0].constant or 0
    rows, factors = as_bytes(emit, x if rank == 2 else emit.reshape(x, -1, inputs))
    sums = product(low, rows, whole(low.held[w.name]), whole(low.held[scale.name]), "product")
    found = emit.op("Mul", sums, factors)
    found = found if b is None else emit.op("Add", found, low.wide(b))
    if rank == 2:
        return found
    outer = emit.op("Slice", emit.op("Shape", x), emit.ints(0), emit.ints(-1), emit.ints(0))
    return emit.op("Reshape", found, emit.op("Concat", outer, emit.ints(outputs), axis=0), allowzero=1)
