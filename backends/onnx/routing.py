"""Routers as ONNX nodes, all in f32: TopK takes the lower index first among equals, as `route` does.

T tokens, E experts, K experts per token, C places of an expert.
"""

from __future__ import annotations

from typing import Any

from moec.backends.onnx.activations import softplus
from moec.backends.onnx.lowering import Lowering
from moec.ir import Route, RouteExperts, Value


def score(low: Lowering, logits: Any, kind: str) -> Any:
    """logits[T, E] -> [T, E]; softmax over the experts of a token, softmax_tokens over the tokens of an expert."""
    emit = low.emit
    if kind in ("softmax", "softmax_tokens"):
        return emit.op("Softmax", logits, axis=int(kind == "softmax"))
    if kind == "sigmoid":
        return emit.op("Sigmoid", logits)
    if kind == "sqrt_softplus":
        return emit.op("Sqrt", softplus(emit, logits, "f32"))
    return logits


def _f32(low: Lowering, value: Value) -> Any:
    found = low.value(value)
    return found if value.type.dtype == "f32" else low.emit.cast(found, "f32")


def route(op: Route, low: Lowering) -> list[Any]:
    emit = low.emit
    z = _f32(low, op.logits)
    if op.noise is not None:
        z = emit.op("Add", z, _f32(low, op.noise))
    if op.bias is not None and op.bias_on == "logits":
        z = emit.op("Add", z, _f32(low, op.bias))
    s = score(low, z, op.score)
    chosen_by = emit.op("Add", s, _f32(low, op.bias)) if op.bias is not None and op.bias_on == "scores" else s
    if op.groups > 1:
        chosen_by = _keep_groups(op, low, chosen_by)
    _, experts = emit.op_many("TopK", 2, chosen_by, emit.ints(op.k), axis=1, name="top")
    weights = emit.op("GatherElements", s, experts, axis=1)
    if op.score == "softmax_chosen":
        weights = emit.op("Softmax", weights, axis=1)
    weights = _normalize(op, low, weights)
    if op.scale != 1:
        weights = emit.op("Mul", weights, emit.scalar(op.scale, "f32"))
    return [weights, emit.cast(experts, "i32")]


def _keep_groups(op: Route, low: Lowering, chosen_by: Any) -> Any:
    """[T, E] with the experts of all but the best groups set to -inf or 0."""
    emit = low.emit
    tokens = emit.shape_of(chosen_by, 0)
    size = (op.logits.type.shape[1].constant or 0) // op.groups
    parts = emit.reshape(chosen_by, tokens, op.groups, size)
    counted = 1 if op.group_score == "max" else min(2, size)
    best, _ = emit.op_many("TopK", 2, parts, emit.ints(counted), axis=2, name="best_of_group")
    worth = emit.op("ReduceSum", best, emit.ints(2), keepdims=0)
    _, kept = emit.op_many("TopK", 2, worth, emit.ints(op.kept_groups), axis=1, name="groups")
    none = emit.full(0, "i32", tokens, op.groups)
    ones = emit.full(1, "i32", tokens, op.kept_groups)
    mask = emit.cast(emit.op("ScatterElements", none, kept, ones, axis=1), "bool")
    fill = float("-inf") if op.group_fill == "minus_inf" else 0.0
    left = emit.op("Where", emit.op("Unsqueeze", mask, emit.ints(2)), parts, emit.scalar(fill, "f32"))
    return emit.reshape(left, tokens, op.groups * size)


def _normalize(op: Route, low: Lowering, weights: Any) -> Any:
    emit = low.emit
    if op.normalize == "none":
        return weights
    if op.normalize == "norm":
        powers = emit.op("Pow", emit.op("Abs", weights), emit.scalar(op.p, "f32"))
        total = emit.op("ReduceSum", powers, emit.ints(1), keepdims=1)
        return emit.op("Div", weights, emit.op("Pow", total, emit.scalar(1 / op.p, "f32")))
    total = emit.op("ReduceSum", weights, emit.ints(1), keepdims=1)
    least = emit.scalar(op.eps, "f32")
    return emit.op("Div", weights, emit.op("Add" if op.normalize == "sum" else "Max", total, least))


def route_experts(op: RouteExperts, low: Lowering) -> list[Any]:
    emit = low.emit
    s = emit.op("Transpose", score(low, _f32(low, op.logits), op.score), perm=[1, 0])
    experts, tokens = emit.shape_of(s, 0), emit.shape_of(s, 1)
    capacity = emit.size_value(op.capacity)
    found = emit.op("Min", capacity, tokens)
    weights, chosen = emit.op_many("TopK", 2, s, emit.vector(found), axis=1, name="top")
    missing = emit.op("Sub", capacity, found)
    weights = emit.op("Concat", weights, emit.full(0, "f32", experts, missing), axis=1)
    chosen = emit.op("Concat", chosen, emit.full(-1, "i64", experts, missing), axis=1)
    return [weights, emit.cast(chosen, "i32")]
