"""Regions as the front ends lift them. T tokens, K choices, E experts, D model width, F expert width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import (
    Act,
    Add,
    Builder,
    Combine,
    ConcatWeights,
    Constant,
    Gather,
    Glu,
    Group,
    GroupedLinear,
    Linear,
    Mul,
    Region,
    Route,
    ScaleRows,
    SelectExperts,
    Tensor,
    Value,
    Weight,
)

# The activation attributes of gpt-oss, the richest in use.
CLAMPED: dict[str, Any] = {"fn": "silu", "alpha": 1.702, "limit": 7.0, "up_shift": 1.0}


def weight(b: Builder, name: str, dtype: str, *shape: int) -> Value:
    return b.add(Weight(ref=name, type=Tensor.of(dtype, *shape)), f"w_{name}")


def moe_inputs(b: Builder, *, d: int, k: int, dtype: str = "f32", t: int | str = "T") -> tuple[Value, Value, Value]:
    x = b.input("x", Tensor.of(dtype, t, d))
    experts = b.input("experts", Tensor.of("i32", t, k))
    return x, experts, b.input("weights", Tensor.of("f32", t, k))


def mixtral_layer(
    name: str,
    *,
    e: int,
    k: int,
    d: int,
    f: int,
    dtype: str = "f32",
    t: int | str = "T",
    bias: bool = False,
    layout: str = "concat",
    on_input: bool = False,
    **activation: Any,
) -> Region:
    """An MoE layer whose router stays outside. layout "none": not gated; "pair": gate and up are two weights."""
    b = Builder(name)
    x, experts, weights = moe_inputs(b, d=d, k=k, dtype=dtype, t=t)
    order, offsets = b.add_many(Group(experts, experts=e), ("order", "offsets"))
    rows = b.add(Gather(x, order, k=k), "rows")
    if on_input:
        rows = b.add(ScaleRows(rows, order, weights), "scaled")
    layer = Ffn(b, offsets=offsets, experts=e, bias=bias)
    out = layer.down(layer.hidden(rows, f, layout, **activation), d, "out")
    return b.build(b.add(Combine(out, order, weights), "y"))


def dense_layer(
    name: str, *, d: int, f: int, dtype: str = "f32", bias: bool = False, layout: str = "concat", **activation: Any
) -> Region:
    """A dense FFN: linear, activation, linear."""
    b = Builder(name)
    x = b.input("x", Tensor.of(dtype, "T", d))
    layer = Ffn(b, bias=bias)
    return b.build(layer.down(layer.hidden(x, f, layout, **activation), d, "y"))


@dataclass(frozen=True)
class Ffn:
    """The ops of an FFN, one by one: linear without experts, grouped_linear with."""

    b: Builder
    offsets: Value | None = None
    experts: int | None = None
    bias: bool = False
    prefix: str = ""
    """Before the names of weights, for a second FFN in a region."""

    def product(self, x: Value, role: str, width: int, result: str) -> Value:
        """x times the weight called `role`, `width` outputs."""
        dtype, inputs = x.type.dtype, x.type.shape[-1].constant
        assert inputs is not None
        outer = () if self.experts is None else (self.experts,)
        w = weight(self.b, self.prefix + role, dtype, *outer, width, inputs)
        bias = weight(self.b, f"{self.prefix}{role}_bias", dtype, *outer, width) if self.bias else None
        if self.offsets is None:
            return self.b.add(Linear(x, w, b=bias), result)
        return self.b.add(GroupedLinear(x, self.offsets, w, b=bias), result)

    def hidden(self, x: Value, f: int, layout: str, **given: Any) -> Value:
        """The first products and the activation."""
        activation: dict[str, Any] = {"fn": "silu", **given}
        if layout == "none":
            return self.b.add(Act(self.product(x, "up", f, "h"), **activation), "a")
        if layout == "pair":
            gate, up = self.product(x, "gate", f, "g"), self.product(x, "up", f, "u")
            return self.b.add(Glu(gate, up, **activation), "a")
        return self.b.add(Glu(self.product(x, "gate_up", 2 * f, "h"), layout=layout, **activation), "a")

    def down(self, a: Value, d: int, result: str) -> Value:
        return self.product(a, "down", d, result)


def shared_expert_layer() -> Region:
    """A router in the IR, four routed experts, and a shared expert behind a gate of its own."""
    b = Builder("moe")
    x = b.input("x", Tensor.of("f32", "T", 8))
    logits = b.add(Linear(x, weight(b, "router", "f32", 4, 8)), "logits")
    weights, experts = b.add_many(Route(logits, k=2, normalize="sum"), ("weights", "experts"))
    order, offsets = b.add_many(Group(experts, experts=4), ("order", "offsets"))
    rows = b.add(Gather(x, order, k=2), "rows")
    routed = Ffn(b, offsets=offsets, experts=4)
    out = routed.down(routed.hidden(rows, 16, "concat"), 8, "out")
    y = b.add(Combine(out, order, weights), "y")
    shared = Ffn(b, prefix="shared_")
    s = shared.down(shared.hidden(x, 32, "concat"), 8, "s")
    logit = b.add(Linear(x, weight(b, "shared_gate", "f32", 1, 8)), "logit")
    gate = b.add(Act(logit, fn="sigmoid"), "gate")
    return b.build(b.add(Add(y, b.add(Mul(s, gate), "gated")), "sum"))


def untidy_layer() -> Region:
    """A layer with everything that canonicalize takes away."""
    b = Builder("untidy")
    unused = weight(b, "unused", "f32", 3)
    x, experts, weights = moe_inputs(b, d=8, k=2)
    down = weight(b, "down", "f32", 4, 8, 16)
    order, offsets = b.add_many(Group(experts, experts=4), ("order", "offsets"))
    rows = b.add(Gather(x, order, k=2), "rows")
    ones = b.add(Constant(value=1.0, type=weights.type), "ones")
    scaled = b.add(ScaleRows(rows, order, ones), "scaled")
    again, offsets_again = b.add_many(Group(experts, experts=4), ("order_again", "offsets_again"))
    gate_up = weight(b, "gate_up", "f32", 4, 32, 8)
    alone = b.add(ConcatWeights((gate_up,), axis=1), "alone")
    same = b.add(SelectExperts(alone, experts=(0, 1, 2, 3)), "same")
    h = b.add(GroupedLinear(scaled, offsets_again, same, dtype="f32"), "h")
    h = b.add(Act(h, fn="identity"), "h_same")
    a = b.add(Glu(h, fn="silu", layout="concat"), "a")
    a = b.add(Mul(b.add(Constant(value=1.0, type=Tensor.of("f32", 1)), "one"), a), "a_same")
    b.add(Add(unused, unused), "dead")
    out = b.add(GroupedLinear(a, offsets, down), "out")
    y = b.add(Combine(out, again, weights), "y")
    zero = b.add(Constant(value=0.0, type=Tensor.of("f32", 8)), "zero")
    return b.build(b.add(Add(b.add(Add(y, zero), "y_same"), x), "residual"))
