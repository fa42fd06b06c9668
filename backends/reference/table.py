"""Which function is the meaning of which op: each takes the op and the frame and gives the op's results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moec.backends.reference import activations, combining, fused, grouping, norms, products, routing
from moec.backends.reference import weights as of_weights
from moec.backends.reference.dtypes import DTYPES
from moec.backends.reference.frame import Frame
from moec.backends.reference.fused import Matrix
from moec.backends.reference.joined import Experts, Joined, Selected
from moec.backends.reference.opaque import opaque
from moec.ir import (
    Act,
    Add,
    BatchNorm,
    Combine,
    CombineDense,
    ConcatWeights,
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
    Opaque,
    Pointwise,
    QuantizeRows,
    QuantizeWeight,
    Route,
    RouteExperts,
    ScaleRows,
    SelectExperts,
    Value,
)
from moec.ir.formula import parse_formula

Results = tuple[Experts, ...]


def _group(op: Group, at: Frame) -> Results:
    ids = at.tensor(op.ids)
    if op.by == "expert":
        return grouping.group_chosen(ids)
    kept = None
    if op.capacity is not None:
        kept = grouping.within_capacity(
            ids,
            at.maybe(op.weights),
            capacity=at.size(op.capacity),
            policy=op.policy,
            priority=op.priority,
            sequence=None if op.sequence is None else at.size(op.sequence),
        )
    return grouping.group(ids, op.experts, kept)


def _gather(op: Gather, at: Frame) -> Results:
    return (grouping.gather(at.tensor(op.x), at.tensor(op.order), op.k),)


def _exchange(op: Exchange, at: Frame) -> Results:
    return grouping.exchange(at.tensor(op.rows), at.tensor(op.offsets), op.device_order(), back=op.back)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else DTYPES[name]


def _linear(op: Linear, at: Frame) -> Results:
    more = (at.maybe(op.b), at.maybe(op.scale), at.maybe(op.x_scale))
    return (products.linear(at.tensor(op.x), at.experts(op.w), *more, _dtype(op.dtype)),)


def _grouped_linear(op: GroupedLinear, at: Frame) -> Results:
    rows, offsets, w = at.tensor(op.rows), at.tensor(op.offsets), at.experts(op.w)
    more = (at.maybe_experts(op.b), at.maybe_experts(op.scale), at.maybe(op.x_scale))
    outputs = at.size(op.w.type.shape[1])
    return (products.grouped_linear(rows, offsets, w, *more, _dtype(op.dtype), outputs=outputs),)


def _quantize_rows(op: QuantizeRows, at: Frame) -> Results:
    return products.quantize_rows(at.tensor(op.x), op.groups)


def _act(op: Act, at: Frame) -> Results:
    return (activations.act(at.tensor(op.x), op),)


def _glu(op: Glu, at: Frame) -> Results:
    return (activations.glu(at.tensor(op.gate), at.maybe(op.up), op),)


def _pointwise(op: Pointwise, at: Frame) -> Results:
    return (activations.pointwise(at.tensor(op.a), at.maybe(op.b), parse_formula(op.formula)),)


def _norm(op: Norm, at: Frame) -> Results:
    read = at.maybe if op.offsets is None else at.maybe_experts
    return (norms.norm(op, at.tensor(op.x), at.maybe(op.offsets), read(op.w), read(op.b)),)


def _batch_norm(op: BatchNorm, at: Frame) -> Results:
    given = (at.experts(op.mean), at.experts(op.var), at.maybe_experts(op.w), at.maybe_experts(op.b))
    return (norms.batch_norm(op, at.tensor(op.x), at.tensor(op.offsets), given),)


def _combine(op: Combine, at: Frame) -> Results:
    rows, order, weights = at.tensor(op.rows), at.tensor(op.order), at.tensor(op.weights)
    if op.tokens is not None:
        return (combining.combine_chosen(rows, order, weights, at.size(op.tokens)),)
    return (combining.combine(rows, order, weights),)


def _scale_rows(op: ScaleRows, at: Frame) -> Results:
    return (combining.scale_rows(at.tensor(op.rows), at.tensor(op.order), at.tensor(op.weights), op.by),)


def _kept_weights(op: KeptWeights, at: Frame) -> Results:
    return (combining.kept_weights(at.tensor(op.weights), at.tensor(op.order), op.normalize, op.eps),)


def _identity_rows(op: IdentityRows, at: Frame) -> Results:
    x, ids, weights = at.tensor(op.x), at.tensor(op.ids), at.tensor(op.weights)
    return (combining.identity_rows(x, ids, weights, op.first, op.count),)


def _dispatch_dense(op: DispatchDense, at: Frame) -> Results:
    return combining.dispatch_dense(at.tensor(op.x), at.tensor(op.weights), op.softmax)


def _combine_dense(op: CombineDense, at: Frame) -> Results:
    return (combining.combine_dense(at.tensor(op.rows), at.tensor(op.weights), op.softmax),)


def _route(op: Route, at: Frame) -> Results:
    return routing.route(op, at.tensor(op.logits), at.maybe(op.bias), at.maybe(op.noise))


def _route_experts(op: RouteExperts, at: Frame) -> Results:
    return routing.route_experts(at.tensor(op.logits), at.size(op.capacity), op.score)


def _add(op: Add, at: Frame) -> Results:
    return (at.tensor(op.a) + at.tensor(op.b),)


def _mul(op: Mul, at: Frame) -> Results:
    return (at.tensor(op.a) * at.tensor(op.b),)


def _matrix(at: Frame, w: Value, b: Value | None, scale: Value | None) -> Matrix:
    return Matrix(at.experts(w), at.maybe_experts(b), at.maybe_experts(scale), at.size(w.type.shape[-2]))


def _up(op: ExpertGlu | ExpertFfn | DenseFfn, at: Frame) -> Matrix | None:
    return None if op.w_up is None else _matrix(at, op.w_up, op.b_up, op.scale_up)


def _expert_glu(op: ExpertGlu, at: Frame) -> Results:
    first = _matrix(at, op.w, op.b, op.scale)
    return (fused.expert_glu(op, at.tensor(op.x), at.tensor(op.order), at.tensor(op.offsets), first, _up(op, at)),)


def _expert_ffn(op: ExpertFfn, at: Frame) -> Results:
    first, second = _matrix(at, op.w_in, op.b_in, op.scale_in), _matrix(at, op.w_out, op.b_out, op.scale_out)
    x, experts, weights = at.tensor(op.x), at.tensor(op.experts), at.tensor(op.weights)
    num_experts = at.size(op.w_in.type.shape[0])
    return (fused.expert_ffn(op, x, experts, weights, first, _up(op, at), second, num_experts),)


def _dense_ffn(op: DenseFfn, at: Frame) -> Results:
    first, second = _matrix(at, op.w_in, op.b_in, op.scale_in), _matrix(at, op.w_out, op.b_out, op.scale_out)
    return (fused.dense_ffn(op, at.tensor(op.x), first, _up(op, at), second),)


def _constant(op: Constant, at: Frame) -> Results:
    shape = tuple(at.size(size) for size in op.type.shape)
    return (of_weights.constant(op.value, op.type, shape, at.device),)


def _concat(op: ConcatWeights, at: Frame) -> Results:
    return (Joined([at.experts(w) for w in op.weights], op.axis),)


def _select(op: SelectExperts, at: Frame) -> Results:
    return (Selected(at.experts(op.w), op.experts),)


def _quantize_weight(op: QuantizeWeight, at: Frame) -> Results:
    return of_weights.quantize_weight(at.experts(op.w), op.w.type.rank)


Meaning = Callable[[Any, Frame], Results]
MEANINGS: Mapping[type[Op], Meaning] = {
    Act: _act,
    Add: _add,
    BatchNorm: _batch_norm,
    Combine: _combine,
    CombineDense: _combine_dense,
    ConcatWeights: _concat,
    Constant: _constant,
    DenseFfn: _dense_ffn,
    DispatchDense: _dispatch_dense,
    Exchange: _exchange,
    ExpertFfn: _expert_ffn,
    ExpertGlu: _expert_glu,
    Gather: _gather,
    Glu: _glu,
    Group: _group,
    GroupedLinear: _grouped_linear,
    IdentityRows: _identity_rows,
    KeptWeights: _kept_weights,
    Linear: _linear,
    Mul: _mul,
    Norm: _norm,
    Opaque: opaque,
    Pointwise: _pointwise,
    QuantizeRows: _quantize_rows,
    QuantizeWeight: _quantize_weight,
    Route: _route,
    RouteExperts: _route_experts,
    ScaleRows: _scale_rows,
    SelectExperts: _select,
}
