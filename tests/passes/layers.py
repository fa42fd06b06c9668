"""Regions as the front ends lift them. T tokens, K choices, E experts, D model width, F expert width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir import (
    Act,
    Builder,
    Combine,
    Gather,
    Glu,
    Group,
    GroupedLinear,
    Linear,
    Region,
    ScaleRows,
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
