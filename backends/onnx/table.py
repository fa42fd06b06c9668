"""Which function lowers which op: each takes the op and the lowering, and gives the op's results as ONNX values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moec.backends.onnx import activations, combining, fused, grouping, norms, products, routing
from moec.backends.onnx.emitter import DTYPES
from moec.backends.onnx.lowering import Lowering
from moec.ir import (
    Act,
    Add,
    BatchNorm,
    Combine,
    CombineDense,
    Constant,
    DenseFfn,
    DispatchDense,
    Exchange,
    ExpertFfn,
    ExpertGlu,
    Gather,
    Glu,
    Group,
    GroupedLinear,
    IdentityRows,
    KeptWeights,
    Linear,
    Mul,
    Norm,
    Op,
    Pointwise,
    QuantizeRows,
    Route,
    RouteExperts,
    ScaleRows,
)


def _constant(op: Constant, low: Lowering) -> list[Any]:
    return [low.emit.full(op.value, op.type.dtype, *(low.size(size) for size in op.type.shape))]


def _elementwise(kind: str) -> Callable[[Add | Mul, Lowering], list[Any]]:
    def lower(op: Add | Mul, low: Lowering) -> list[Any]:
        dtype = op.a.type.dtype
        if dtype == "i8":  # which ONNX Runtime does not add
            wide = low.emit.op(kind, low.emit.cast(low.value(op.a), "i32"), low.emit.cast(low.value(op.b), "i32"))
            return [low.emit.cast(wide, "i8")]
        return [low.rounded(low.emit.op(kind, low.wide(op.a), low.wide(op.b)), dtype)]

    return lower


Lower = Callable[[Any, Lowering], list[Any]]
LOWERINGS: Mapping[type[Op], Lower] = {
    Act: activations.act,
    Add: _elementwise("Add"),
    Combine: combining.combine,
    CombineDense: combining.combine_dense,
    Constant: _constant,
    DenseFfn: fused.dense_ffn,
    DispatchDense: combining.dispatch_dense,
    Exchange: grouping.exchange,
    ExpertFfn: fused.expert_ffn,
    ExpertGlu: fused.expert_glu,
    Gather: grouping.gather,
    Glu: activations.glu,
    Group: grouping.group,
    GroupedLinear: products.grouped_linear,
    IdentityRows: combining.identity_rows,
    KeptWeights: combining.kept_weights,
    Linear: products.linear,
    Mul: _elementwise("Mul"),
    BatchNorm: norms.batch_norm,
    Norm: norms.norm,
    Pointwise: activations.pointwise,
    QuantizeRows: products.quantize_rows,
    Route: routing.route,
    RouteExperts: routing.route_experts,
    ScaleRows: combining.scale_rows,
}


def unsupported(op: Op) -> str | None:
    """Why the op has no lowering, or None."""
    erf = getattr(op, "fn", "") == "gelu" or "gelu(" in getattr(op, "formula", "")
    if erf and op.result_types()[0].dtype == "f64":
        return "ONNX Runtime has no Erf in f64"
    if type(op) in LOWERINGS or op.of_weights:
        return _unsized(op)
    if op.name == "opaque":
        return "the user's own graph is not ONNX"
    return "it has no lowering in moec.backends.onnx.table"


def _unsized(op: Op) -> str | None:
    """Experts are told apart when the graph is written, so their number and their widths must be known."""
    for name, value in op.named_operands:
        of_experts = name.startswith(("w", "scale", "b_")) and value.type.rank > 1 and name != "weights"
        if of_experts and value.type.letters and not op.of_weights:
            return f"the sizes of {name} {value.type} are not known until it runs"
    unknown = [value for value in op.operands if value.type.dtype not in DTYPES]
    return f"{unknown[0]} has a type that ONNX does not have" if unknown else None
