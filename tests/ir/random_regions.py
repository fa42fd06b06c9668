"""Random well-typed regions that use every op; each maker adds one op, with operands that are new or found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from moec.ir import (
    FUSED_LAYOUTS,
    OPS,
    Act,
    Add,
    BatchNorm,
    Combine,
    CombineDense,
    ConcatWeights,
    Constant,
    DenseFfn,
    Dim,
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
    Opaque,
    Pointwise,
    QuantizeRows,
    QuantizeWeight,
    Region,
    Route,
    RouteExperts,
    ScaleRows,
    SelectExperts,
    Tensor,
    Value,
    Weight,
)
from tests.ir.expressions import SHAPE_SIZES
from tests.ir.making import NUMBERS, STRINGS, Making


def _weight(m: Making) -> None:
    shape = m.draw(st.lists(SHAPE_SIZES, max_size=3))
    m.builder.add(Weight(ref=f"w{len(m.builder.nodes)}", type=Tensor("i64", tuple(shape))))


def _constant(m: Making) -> None:
    m.builder.add(Constant(value=m.draw(st.floats(-1e9, 1e9)), type=Tensor("f16", (m.tokens,))))


def _linear(m: Making) -> None:
    c, n = m.width(), m.width()
    x = m.value(m.dtype, *m.draw(st.lists(SHAPE_SIZES, max_size=2)), c)
    dtype = m.draw(st.sampled_from([None, "f64"]))
    m.builder.add(Linear(x, m.value(m.dtype, n, c), b=m.some("f32", n), dtype=dtype))


def _route(m: Making) -> None:
    e = m.draw(st.integers(4, 8)) * 2
    normalize = m.draw(st.sampled_from(["none", "sum", "clamped_sum", "norm"]))
    groups = m.draw(st.sampled_from([1, 2]))
    bias = m.some("f32", e)
    op = Route(
        m.value(m.dtype, m.tokens, e),
        bias=bias,
        noise=m.some("f32", m.tokens, e),
        k=m.k,
        score=m.draw(st.sampled_from(["softmax", "softmax_chosen", "sigmoid", "sqrt_softplus", "identity"])),
        bias_on="scores" if bias is None else m.draw(st.sampled_from(["scores", "logits"])),
        groups=groups,
        kept_groups=m.draw(st.integers(1, groups)),
        group_score=m.draw(st.sampled_from(["max", "top2"])),
        normalize=normalize,
        eps=m.draw(NUMBERS) if "sum" in normalize else 0.0,
        p=2.0 if normalize == "norm" else 1.0,
        scale=m.draw(NUMBERS),
    )
    m.builder.add_many(op, ("weights", "experts"))


def _route_experts(m: Making) -> None:
    op = RouteExperts(m.value(m.dtype, m.tokens, m.experts), capacity=Dim.parse("ceildiv(5T, 16)"))
    weights, tokens = m.builder.add_many(op, ("weights", "tokens"))
    order, _ = m.builder.add_many(Group(tokens, experts=m.experts, by="expert"), ("order", "offsets"))
    rows = m.builder.add(Gather(m.value(m.dtype, m.tokens, m.width()), order, k=1))
    rows = m.builder.add(ScaleRows(rows, order, weights, by="expert"))
    m.builder.add(Combine(rows, order, weights, by="expert", tokens=m.tokens))


def _group(m: Making) -> tuple[Value, Value]:
    ids = m.value(m.draw(st.sampled_from(["i32", "i64"])), m.tokens, m.k)
    capacity = m.draw(st.one_of(st.none(), SHAPE_SIZES.filter(lambda size: size.letters <= {"T"})))
    if capacity is None:
        order, offsets = m.builder.add_many(Group(ids, experts=m.experts), ("order", "offsets"))
        return order, offsets
    policy = m.draw(st.sampled_from(["arrival", "weight", "token_weight"]))
    weights = None if policy == "arrival" else m.value(m.dtype, m.tokens, m.k)
    sequence = m.draw(st.sampled_from([None, Dim.of(16)]))
    op = Group(
        ids,
        weights,
        experts=m.experts,
        capacity=capacity,
        policy=policy,
        priority=m.draw(st.sampled_from(["token", "choice"])),
        scope="batch" if sequence is None else "sequence",
        sequence=sequence,
    )
    order, offsets = m.builder.add_many(op, ("order", "offsets"))
    return order, offsets


def _gather(m: Making) -> None:
    m.builder.add(Gather(m.value(m.dtype, m.tokens, m.width()), m.value("i32", m.slots()), k=m.k))


def _exchange(m: Making) -> None:
    devices = m.draw(st.integers(1, 4))
    owners = tuple(m.draw(st.lists(st.integers(0, devices - 1), min_size=m.experts, max_size=m.experts)))
    rows, offsets = m.value(m.dtype, m.slots(), m.width()), m.value("i32", m.experts + 1)
    back = m.draw(st.booleans())
    m.builder.add_many(Exchange(rows, offsets, owners=owners, devices=devices, back=back), ("sent", "offsets"))


def _grouped_linear(m: Making) -> None:
    c, n = m.width(), m.width()
    _, offsets = _group(m)
    rows = m.value(m.dtype, m.slots(), c)
    w = m.value(m.dtype, m.experts, n, c)
    if m.draw(st.booleans()):
        m.builder.add(GroupedLinear(rows, offsets, w, b=m.some("f32", m.experts, n)))
        return
    q, scale = m.builder.add_many(QuantizeWeight(w), ("q", "scale"))
    if m.draw(st.booleans()):
        m.builder.add(GroupedLinear(rows, offsets, q, scale=scale))
        return
    rows, row_scale = m.builder.add_many(QuantizeRows(rows), ("rows_q", "rows_scale"))
    m.builder.add(GroupedLinear(rows, offsets, q, scale=scale, x_scale=row_scale, dtype=m.dtype))


def _quantize_rows(m: Making) -> None:
    groups = m.draw(st.integers(1, 3))
    m.builder.add_many(QuantizeRows(m.value(m.dtype, m.tokens, 4 * groups), groups=groups), ("q", "scale"))


def _quantize_weight(m: Making) -> None:
    m.builder.add_many(QuantizeWeight(m.value(m.dtype, m.width(), m.width())), ("q", "scale"))


def _act(m: Making) -> None:
    m.builder.add(Act(m.value(m.dtype, *m.draw(st.lists(SHAPE_SIZES, max_size=3))), **m.activation()))


def _glu(m: Making) -> None:
    f = m.width()
    shift = m.draw(st.sampled_from([0.0, 1.0]))
    if m.draw(st.booleans()):
        gate, up = m.value(m.dtype, m.tokens, f), m.value(m.dtype, m.tokens, f)
        m.builder.add(Glu(gate, up, up_shift=shift, **m.activation()))
        return
    layout = m.draw(st.sampled_from(FUSED_LAYOUTS))
    m.builder.add(Glu(m.value(m.dtype, m.tokens, 2 * f), layout=layout, up_shift=shift, **m.activation()))


def _fused(m: Making, *outer: int) -> tuple[dict[str, Any], int, int]:
    """Attributes and up weights of a fused op, its input width and its F; `outer` are the experts, if any."""
    d, f = m.width(), m.width()
    layout = m.draw(st.sampled_from(["none", "pair", *FUSED_LAYOUTS]))
    more: dict[str, Any] = {"layout": layout, "up_shift": 0.0 if layout == "none" else 1.0, **m.activation()}
    if layout == "pair":
        more |= {"w_up": m.value(m.dtype, *outer, f, d), "b_up": m.some("f32", *outer, f)}
    return more, d, f


def _rows(more: dict[str, Any], f: int) -> int:
    return f if more["layout"] in ("none", "pair") else 2 * f


def _expert_glu(m: Making) -> None:
    more, d, f = _fused(m, m.experts)
    order, offsets = _group(m)
    w = m.value(m.dtype, m.experts, _rows(more, f), d)
    m.builder.add(ExpertGlu(m.value(m.dtype, m.tokens, d), order, offsets, w, k=m.k, **more))


def _expert_ffn(m: Making) -> None:
    more, d, f = _fused(m, m.experts)
    w_in, w_out = m.value(m.dtype, m.experts, _rows(more, f), d), m.value(m.dtype, m.experts, d, f)
    x, ids, weights = m.value(m.dtype, m.tokens, d), m.value("i32", m.tokens, m.k), m.value("f32", m.tokens, m.k)
    m.builder.add(ExpertFfn(x, ids, weights, w_in, w_out, b_out=m.some(m.dtype, m.experts, d), **more))


def _dense_ffn(m: Making) -> None:
    more, d, f = _fused(m)
    w_in, w_out = m.value(m.dtype, _rows(more, f), d), m.value(m.dtype, d, f)
    x = m.value(m.dtype, *m.draw(st.lists(SHAPE_SIZES, max_size=2)), d)
    m.builder.add(DenseFfn(x, w_in, w_out, b_in=m.some("f32", _rows(more, f)), **more))


def _combine(m: Making) -> None:
    order, _ = _group(m)
    m.builder.add(Combine(m.value(m.dtype, m.slots(), m.width()), order, m.value("f32", m.tokens, m.k)))


def _scale_rows(m: Making) -> None:
    order = m.value("i64", m.slots())
    m.builder.add(ScaleRows(m.value(m.dtype, m.slots(), m.width()), order, m.value(m.dtype, m.tokens, m.k)))


def _kept_weights(m: Making) -> None:
    order, _ = _group(m)
    how = m.draw(st.sampled_from([{}, {"normalize": "sum"}, {"normalize": "clamped_sum", "eps": 1e-6}]))
    m.builder.add(KeptWeights(m.value(m.dtype, m.tokens, m.k), order, **how))


def _identity_rows(m: Making) -> None:
    x, ids = m.value(m.dtype, m.tokens, m.width()), m.value("i32", m.tokens, m.k)
    m.builder.add(IdentityRows(x, ids, m.value("f32", m.tokens, m.k), first=m.experts, count=m.width()))


def _norm(m: Making) -> None:
    d, kind, eps = m.width(), m.draw(st.sampled_from(["rms", "layer", "none"])), m.draw(NUMBERS)
    eps = 0.0 if kind == "none" else eps
    x = m.value(m.dtype, m.slots(), d)
    if m.draw(st.booleans()):
        m.builder.add(Norm(x, w=m.value("f32", d), b=m.some(m.dtype, d), kind=kind, eps=eps, w_shift=1.0))
        return
    w = m.value(m.dtype, m.experts, d)
    m.builder.add(Norm(x, offsets=m.value("i32", m.experts + 1), w=w, kind=kind, eps=eps))


def _batch_norm(m: Making) -> None:
    shape, eps = (m.experts, m.width()), m.draw(NUMBERS)
    x, offsets = m.value(m.dtype, m.slots(), shape[1]), m.value("i32", m.experts + 1)
    statistics = (m.value(m.dtype, *shape), m.value("f32", *shape))
    m.builder.add(BatchNorm(x, offsets, *statistics, w=m.some(m.dtype, *shape), b=m.some("f32", *shape), eps=eps))


def _pointwise(m: Making) -> None:
    size, formula = (m.slots(), m.width()), m.draw(st.sampled_from(["tanh(a / 3) * 3", "a * sigmoid(-a)"]))
    a = m.value(m.dtype, *size)
    gated = m.draw(st.booleans())
    m.builder.add(Pointwise(a, m.value(m.dtype, *size) if gated else None, formula=formula + " * b" * gated))


def _dense_dispatch(m: Making) -> None:
    weights, d = m.value("f32", m.tokens, m.experts, m.width()), m.width()
    softmax = m.draw(st.booleans())
    rows, _ = m.builder.add_many(
        DispatchDense(m.value(m.dtype, m.tokens, d), weights, softmax=softmax), ("rows", "offsets")
    )
    m.builder.add(CombineDense(rows, weights, softmax=softmax))


def _add(m: Making) -> None:
    d = m.width()
    m.builder.add(Add(m.value(m.dtype, m.tokens, d), m.value(m.dtype, d)))


def _mul(m: Making) -> None:
    m.builder.add(Mul(m.value(m.dtype, m.tokens, 1), m.value(m.dtype, m.tokens, m.width())))


def _concat_weights(m: Making) -> None:
    c = m.width()
    weights = tuple(m.value(m.dtype, m.experts, m.width(), c) for _ in range(m.draw(st.integers(1, 3))))
    m.builder.add(ConcatWeights(weights, axis=1))


def _select_experts(m: Making) -> None:
    experts = tuple(m.draw(st.lists(st.integers(0, m.experts - 1), min_size=1, max_size=5)))
    m.builder.add(SelectExperts(m.value(m.dtype, m.experts, m.width()), experts=experts))


def _opaque(m: Making) -> None:
    args = tuple(m.value(m.dtype, m.tokens, m.width()) for _ in range(m.draw(st.integers(0, 3))))
    types = tuple(Tensor("bool", (m.tokens, m.draw(SHAPE_SIZES))) for _ in range(m.draw(st.integers(1, 3))))
    names = tuple(f"o{number}" for number in range(len(types)))
    m.builder.add_many(Opaque(args, graph=m.draw(STRINGS), types=types), names)


MAKERS: dict[str, Callable[[Making], object]] = {
    "act": _act,
    "add": _add,
    "combine": _combine,
    "combine_dense": _dense_dispatch,
    "concat_weights": _concat_weights,
    "constant": _constant,
    "dense_ffn": _dense_ffn,
    "dispatch_dense": _dense_dispatch,
    "exchange": _exchange,
    "expert_ffn": _expert_ffn,
    "expert_glu": _expert_glu,
    "gather": _gather,
    "glu": _glu,
    "group": _group,
    "grouped_linear": _grouped_linear,
    "identity_rows": _identity_rows,
    "kept_weights": _kept_weights,
    "linear": _linear,
    "mul": _mul,
    "batch_norm": _batch_norm,
    "norm": _norm,
    "pointwise": _pointwise,
    "opaque": _opaque,
    "quantize_rows": _quantize_rows,
    "quantize_weight": _quantize_weight,
    "route": _route,
    "route_experts": _route_experts,
    "scale_rows": _scale_rows,
    "select_experts": _select_experts,
    "weight": _weight,
}
assert set(MAKERS) == set(OPS), "an op without a maker"


@st.composite
def regions(draw: Callable[[st.SearchStrategy[Any]], Any], *, op: str | None = None) -> Region:
    """A region of this op, up to three others and what they need."""
    making = Making(draw)
    # Every letter of SHAPE_SIZES has a value.
    making.builder.input("sizes", Tensor.of("i32", "T", "K", "E", "C"))
    names = draw(st.lists(st.sampled_from(sorted(MAKERS)), min_size=0 if op else 1, max_size=3))
    for name in [*([op] if op else []), *names]:
        MAKERS[name](making)
    values = [value for node in making.builder.nodes for value in node.results]
    return making.builder.build(*draw(st.lists(st.sampled_from(values), min_size=1, max_size=3)))
