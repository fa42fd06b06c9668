"""Nodes that provably change nothing: what canonicalize takes away, one rule for each op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moec.ir import (
    Act,
    Add,
    ConcatWeights,
    Constant,
    Dim,
    Gather,
    Group,
    GroupedLinear,
    Linear,
    Mul,
    Node,
    Op,
    ScaleRows,
    SelectExperts,
    Value,
)

# What a value is computed by, for rules that look one node back.
Producers = Mapping[Value, Node]


def same_value(op: Op, producers: Producers) -> Value | None:
    """The operand that the op's only result always equals, or None."""
    rule = _SAME.get(type(op))
    found: Value | None = rule(op, producers) if rule else None
    return found


def simpler(op: Op) -> Op:
    """The op without attributes that say nothing."""
    if isinstance(op, Linear | GroupedLinear):
        return _without_dtype(op)
    return _without_capacity(op) if isinstance(op, Group) else op


def _act(op: Act, producers: Producers) -> Value | None:
    return op.x if op.fn == "identity" and op.limit is None else None


def _concat(op: ConcatWeights, producers: Producers) -> Value | None:
    return op.weights[0] if len(op.weights) == 1 else None


def _select(op: SelectExperts, producers: Producers) -> Value | None:
    num_experts = op.w.type.shape[0].constant
    return op.w if num_experts is not None and op.experts == tuple(range(num_experts)) else None


def _add(op: Add, producers: Producers) -> Value | None:
    return _neutral(op.a, op.b, 0, producers)


def _mul(op: Mul, producers: Producers) -> Value | None:
    return _neutral(op.a, op.b, 1, producers)


def _neutral(a: Value, b: Value, number: int, producers: Producers) -> Value | None:
    """The other operand where one is this constant and does not widen the result. -0 + 0 counts as the same number."""
    for kept, other in ((a, b), (b, a)):
        if _is_constant(other, number, producers) and _fits_in(other, kept):
            return kept
    return None


def _fits_in(small: Value, large: Value) -> bool:
    """Whether broadcasting the small one leaves the large one's shape as it is."""
    sizes = small.type.shape
    if len(sizes) > large.type.rank:
        return False
    behind = large.type.shape[large.type.rank - len(sizes) :]
    return all(size in (Dim.of(1), other) for size, other in zip(sizes, behind, strict=True))


def _scale_rows(op: ScaleRows, producers: Producers) -> Value | None:
    """Weights of one. The rows must be gathered in this order: then those of no slot are zeros already."""
    source = producers.get(op.rows)
    gathered = source is not None and isinstance(source.op, Gather) and source.op.order == op.order
    return op.rows if gathered and _is_constant(op.weights, 1, producers) else None


def _is_constant(value: Value, number: int, producers: Producers) -> bool:
    source = producers.get(value)
    return source is not None and isinstance(source.op, Constant) and source.op.value == number


def _without_dtype(op: Linear | GroupedLinear) -> Op:
    x = op.x if isinstance(op, Linear) else op.rows
    return replace(op, dtype=None) if op.dtype == x.type.dtype else op


def _without_capacity(op: Group) -> Op:
    """Dropless where one expert's capacity has room for every slot of its scope."""
    if op.capacity is None:
        return op
    num_tokens, num_choices = op.ids.type.shape
    slots = (num_tokens if op.sequence is None else op.sequence) * num_choices
    if slots.min(op.capacity) != slots:
        return op
    return Group(op.ids, experts=op.experts)


_SAME: Mapping[type[Op], Callable[[Any, Producers], Value | None]] = {
    Act: _act,
    Add: _add,
    ConcatWeights: _concat,
    Mul: _mul,
    ScaleRows: _scale_rows,
    SelectExperts: _select,
}
