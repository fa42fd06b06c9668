"""Activations as ONNX nodes. F expert width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from moec.backends.onnx.emitter import Emitter
from moec.backends.onnx.lowering import Lowering, wide_dtype
from moec.ir import Act, Glu, Pointwise
from moec.ir.formula import Formula, fold, parse_formula
from moec.ir.ops_activation import Activation, GatedActivation


def _silu(emit: Emitter, x: Any, slope: float, dtype: str) -> Any:
    inner = x if slope == 1 else emit.op("Mul", x, emit.scalar(slope, dtype))
    return emit.op("Mul", x, emit.op("Sigmoid", inner))


def _gelu(emit: Emitter, x: Any, dtype: str) -> Any:
    """x / 2 * (1 + erf(x / sqrt 2))."""
    erf = emit.op("Erf", emit.op("Div", x, emit.scalar(math.sqrt(2), dtype)))
    twice = emit.op("Mul", x, emit.op("Add", erf, emit.scalar(1, dtype)))
    return emit.op("Mul", twice, emit.scalar(0.5, dtype))


def _gelu_tanh(emit: Emitter, x: Any, dtype: str) -> Any:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    cube = emit.op("Mul", emit.op("Mul", x, x), x)
    inner = emit.op("Add", x, emit.op("Mul", cube, emit.scalar(0.044715, dtype)))
    tanh = emit.op("Tanh", emit.op("Mul", inner, emit.scalar(math.sqrt(2 / math.pi), dtype)))
    twice = emit.op("Mul", x, emit.op("Add", tanh, emit.scalar(1, dtype)))
    return emit.op("Mul", twice, emit.scalar(0.5, dtype))


def _relu2(emit: Emitter, x: Any, dtype: str) -> Any:
    positive = emit.op("Relu", x)
    return emit.op("Mul", positive, positive)


def softplus(emit: Emitter, x: Any, dtype: str) -> Any:
    """log(1 + e^x) as max(x, 0) + log(1 + e^-|x|), which overflows nowhere."""
    small = emit.op("Exp", emit.op("Neg", emit.op("Abs", x)))
    return emit.op("Add", emit.op("Relu", x), emit.op("Log", emit.op("Add", small, emit.scalar(1, dtype))))


FUNCTIONS: dict[str, Callable[[Emitter, Any, str], Any]] = {
    "identity": lambda emit, x, dtype: x,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda emit, x, dtype: _silu(emit, x, 1.702, dtype),
    "relu": lambda emit, x, dtype: emit.op("Relu", x),
    "relu2": _relu2,
    "sigmoid": lambda emit, x, dtype: emit.op("Sigmoid", x),
    "tanh": lambda emit, x, dtype: emit.op("Tanh", x),
    "softplus": softplus,
}


def activate(emit: Emitter, x: Any, op: Activation, dtype: str) -> Any:
    """x[...] in f32 or f64 -> fn(x), with op's slope and clamps."""
    limit = None if op.limit is None else emit.scalar(op.limit, dtype)
    if limit is not None and not op.clamp_after:
        x = emit.op("Min", x, limit)
    x = _silu(emit, x, op.alpha, dtype) if op.fn == "silu" else FUNCTIONS[op.fn](emit, x, dtype)
    return emit.op("Min", x, limit) if limit is not None and op.clamp_after else x


def gated(emit: Emitter, gate: Any, up: Any | None, op: GatedActivation, dtype: str, width: int) -> Any:
    """gate[..., F] and up, or gate[..., 2F] that holds both, in f32 or f64 -> fn(gate) * (up + up_shift)."""
    if up is None:
        gate, up = split(emit, gate, op.layout, width)
    if op.limit is not None:
        up = emit.op("Max", emit.op("Min", up, emit.scalar(op.limit, dtype)), emit.scalar(-op.limit, dtype))
    if op.up_shift != 0:
        up = emit.op("Add", up, emit.scalar(op.up_shift, dtype))
    return emit.op("Mul", activate(emit, gate, op, dtype), up)


def split(emit: Emitter, both: Any, layout: str, width: int) -> tuple[Any, Any]:
    """gate and up of [..., 2F], by where the layout puts them; `width` is F."""
    if layout.startswith("interleaved"):
        last, step = emit.ints(-1), emit.ints(2)
        first, second = (emit.op("Slice", both, emit.ints(start), emit.ints(2 * width), last, step) for start in (0, 1))
    else:
        first, second = emit.op_many("Split", 2, both, emit.ints(width, width), axis=-1)
    return (second, first) if layout.endswith("up_first") else (first, second)


def fused(emit: Emitter, gate: Any, up: Any | None, op: GatedActivation, dtype: str, width: int) -> Any:
    """The activation behind a product: gated, or plain where the layout says that there is no gate."""
    return activate(emit, gate, op, dtype) if op.layout == "none" else gated(emit, gate, up, op, dtype, width)


def act(op: Act, low: Lowering) -> list[Any]:
    dtype = op.x.type.dtype
    return [low.rounded(activate(low.emit, low.wide(op.x), op, wide_dtype(dtype)), dtype)]


def glu(op: Glu, low: Lowering) -> list[Any]:
    dtype = op.gate.type.dtype
    up = None if op.up is None else low.wide(op.up)
    width = op.result_types()[0].shape[-1].constant or 0
    return [low.rounded(gated(low.emit, low.wide(op.gate), up, op, wide_dtype(dtype), width), dtype)]


_NODES = {
    "+": "Add",
    "-": "Sub",
    "*": "Mul",
    "/": "Div",
    "exp": "Exp",
    "abs": "Abs",
    "neg": "Neg",
    "min": "Min",
    "max": "Max",
}


def pointwise(op: Pointwise, low: Lowering) -> list[Any]:
    emit, dtype = low.emit, wide_dtype(op.a.type.dtype)
    given = {"a": low.wide(op.a), "b": None if op.b is None else low.wide(op.b)}

    def apply(fn: str, args: Sequence[Any]) -> Any:
        if fn == "square":
            return emit.op("Mul", args[0], args[0])
        if fn == "silu":
            return _silu(emit, args[0], 1, dtype)
        return emit.op(_NODES[fn], *args) if fn in _NODES else FUNCTIONS[fn](emit, args[0], dtype)

    def leaf(at: Formula) -> Any:
        return given[at.fn] if at.fn in given else emit.scalar(at.value, dtype)

    return [low.rounded(fold(parse_formula(op.formula), leaf, apply), op.a.type.dtype)]
