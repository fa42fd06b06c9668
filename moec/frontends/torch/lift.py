"""From a proved formula to the IR: an expert body becomes a region and a table of where its weights live.

T tokens, K experts per token, E experts, D inputs of an expert, F its hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moec.frontends.torch.activation import Activation
from moec.frontends.torch.banks import Bank
from moec.frontends.torch.body import Body
from moec.frontends.torch.chain import Affine, Chain, Layer
from moec.frontends.torch.formula import Written
from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.tail import Norm
from moec.ir import (
    Add,
    BatchNorm,
    Builder,
    Combine,
    Constant,
    Dim,
    Gather,
    Glu,
    Group,
    GroupedLinear,
    IdentityRows,
    Linear,
    Mul,
    Pointwise,
    Region,
    ScaleRows,
    Tensor,
    Value,
    Weight,
)
from moec.ir import Norm as NormRows
from moec.ir.ops_activation import Act
from moec.weights import View

DTYPES = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def common_dtype(body: Body, params: Mapping[str, torch.Tensor], dtype: torch.dtype) -> str:
    """The IR's name of `dtype`; raises NotLifted when the body's weights have another, or the IR has no such dtype."""
    found = {params[name].dtype for name in body.params}
    if dtype not in DTYPES or found != {dtype}:
        raise NotLifted(f"weights and input are of different dtypes: {', '.join(sorted(map(str, found)))} and {dtype}")
    return DTYPES[dtype]


def weight_names(body: Body) -> dict[str, str]:
    """Reference in the IR for each role: gate and up by what they are, not by the order of use."""
    if isinstance(body, Chain):
        return {role: _name_in_chain(*role.split("_")) for role in body.banks}
    layout = body.activation.layout if body.activation is not None else None
    if layout == "pair":
        first, second = "gate", "up"
    elif layout == "pair_up_first":
        first, second = "up", "gate"
    else:
        first, second = ("gate_up" if layout is not None else "up"), ""
    if "w_down" not in body.banks:
        first = "proj"
    ends = {"up0": first, "up1": second, "down": "down", "tail": "norm", "scale": "scale"}
    return {role: ("" if role.startswith("w_") else "bias_") + ends[role[2:]] for role in body.banks}


def _name_in_chain(kind: str, place: str) -> str:
    """layer0, bias_layer0, and for a batch norm norm1, bias_norm1, mean_norm1, var_norm1."""
    place = "layer0" if place == "up0" else place
    lead = {"w": "", "scale": "", "b": "bias_", "shift": "bias_"}.get(kind, f"{kind}_")
    return f"{lead}{place}"


class _Lifter:
    def __init__(self, builder: Builder, body: Body, dtype: str, ending: str = "") -> None:
        self.builder, self.body, self.dtype = builder, body, dtype
        self.names = {role: name + ending for role, name in weight_names(body).items()}

    def weight(self, role: str, grouped: bool) -> Value | None:
        bank = self.body.banks.get(role)
        if bank is None:
            return None
        shape = (len(bank.views), *bank.shape) if grouped else bank.shape
        ref = self.names[role]
        prefix = "b_" if role.startswith("b_") else "w_"
        return self.builder.add(
            Weight(ref=ref, type=Tensor.of(self.dtype, *shape)), name=prefix + ref.removeprefix("bias_")
        )

    def product(self, rows: Value, which: str, offsets: Value | None, name: str) -> Value:
        weight = self.weight(f"w_{which}", offsets is not None)
        bias = self.weight(f"b_{which}", offsets is not None)
        assert weight is not None
        if offsets is not None:
            return self.builder.add(GroupedLinear(rows, offsets, weight, b=bias), name=name)
        return self.builder.add(Linear(rows, weight, b=bias), name=name)

    def expert(self, rows: Value, offsets: Value | None) -> Value:
        """f_e of each row."""
        if isinstance(self.body, Chain) and offsets is not None:
            return self.chain(self.body, rows, offsets)
        out = self.products(rows, offsets)
        return out if self.body.tail is None else self.norm(out, offsets, self.body.tail)

    def norm(self, rows: Value, offsets: Value | None, norm: Norm) -> Value:
        """The norm of each expert's rows; weights of one view are all experts' own."""
        each = {role: not self.body.banks[role].shared for role in ("w_tail", "b_tail") if role in self.body.banks}
        if len(set(each.values())) > 1:
            raise NotLifted("one of the norm's vectors is shared by the experts and the other is not")
        grouped = any(each.values())
        w, b = self.weight("w_tail", grouped), self.weight("b_tail", grouped)
        shift = norm.shift
        if w is not None and norm.before:
            if grouped:
                raise NotLifted("experts scale their results by vectors of their own before a norm")
            if shift:
                w = self.builder.add(Add(w, self.builder.add(Constant(value=shift, type=w.type))), name="scale")
            rows, w, shift = self.builder.add(Mul(rows, w), name="scaled"), None, 0.0
        return self.builder.add(
            NormRows(rows, offsets=offsets if grouped else None, w=w, b=b, kind=norm.kind, eps=norm.eps, w_shift=shift),
            name="normed",
        )

    def ending(self, hidden: Value, offsets: Value | None) -> Value:
        """The last layer, of hidden values that a vector of each expert may scale."""
        if "w_scale" in self.body.banks:
            grouped = offsets is not None and not self.body.banks["w_scale"].shared
            scale = self.weight("w_scale", grouped)
            each = offsets if grouped else None
            hidden = self.builder.add(NormRows(hidden, offsets=each, w=scale, kind="none", eps=0.0), name="h_scaled")
        return self.product(hidden, "down", offsets, "out")

    def chain(self, body: Chain, rows: Value, offsets: Value) -> Value:
        """The steps of an expert of any number of layers."""
        for step in body.steps:
            if isinstance(step, Layer):
                rows = self.product(rows, step.place, offsets, "h")
            elif isinstance(step, Affine):
                mean, var, w, b = (self.weight(f"{n}_{step.place}", True) for n in ("mean", "var", "scale", "shift"))
                assert mean is not None
                assert var is not None
                rows = self.builder.add(BatchNorm(rows, offsets, mean, var, w=w, b=b, eps=step.eps), name="normed")
            elif isinstance(step, Written):
                rows = self.builder.add(Pointwise(rows, formula=step.text), name="a")
            else:
                rows = self.builder.add(self.activated(step, rows), name="a")
        return rows

    def activated(self, activation: Activation, rows: Value) -> Act | Glu:
        """The activation of one product's rows."""
        given = {"fn": activation.fn, "limit": activation.limit, "clamp_after": activation.clamp_after}
        given |= {"alpha": activation.alpha} if activation.alpha is not None else {}
        if activation.layout is None:
            return Act(rows, **given)  # type: ignore[arg-type]
        return Glu(rows, layout=activation.layout, up_shift=activation.up_shift, **given)  # type: ignore[arg-type]

    def products(self, rows: Value, offsets: Value | None) -> Value:
        """The expert's two layers, or the one."""
        activation = self.body.activation
        if activation is None:
            return self.product(rows, "up0", offsets, "projected")
        if isinstance(activation, Written):
            gate = self.product(rows, "up0", offsets, "h_gate" if activation.gated else "h")
            up = self.product(rows, "up1", offsets, "h_up") if activation.gated else None
            hidden = self.builder.add(Pointwise(gate, up, formula=activation.text), name="a")
            return self.ending(hidden, offsets)
        attributes: dict[str, Any] = {
            "fn": activation.fn,
            "limit": activation.limit,
            "clamp_after": activation.clamp_after,
        }
        if activation.alpha is not None:
            attributes["alpha"] = activation.alpha
        first = self.product(rows, "up0", offsets, {"up0": "h"}.get(self.names["w_up0"], "h_" + self.names["w_up0"]))
        if activation.layout is None:
            hidden = self.builder.add(Act(first, **attributes), name="a")
        elif activation.layout.startswith("pair"):
            second = self.product(rows, "up1", offsets, "h_" + self.names["w_up1"])
            gate, up = (first, second) if activation.layout == "pair" else (second, first)
            hidden = self.builder.add(
                Glu(gate, up, up_shift=activation.up_shift, layout="pair", **attributes), name="a"
            )
        else:
            hidden = self.builder.add(
                Glu(first, layout=activation.layout, up_shift=activation.up_shift, **attributes), name="a"
            )
        return self.ending(hidden, offsets)


def lift_stages(name: str, bodies: Sequence[Body], *, dtype: str) -> Region:
    """Region of several mixtures that have nothing to do with each other: x [T, D], experts i32 [T, 1] and weights
    [T, 1] for each of them, the later ones' names and letters numbered, and one output [T, O] each.
    """
    b = Builder(name)
    outputs = [_add_stage(b, body, dtype, _ending(i)) for i, body in enumerate(bodies)]
    return b.build(*outputs)


def _ending(stage: int) -> str:
    return f"_{stage + 1}" if stage else ""


def _add_stage(b: Builder, body: Body, dtype: str, ending: str) -> Value:
    letter = f"T{ending.removeprefix('_')}"
    x = b.input(f"x{ending}", Tensor.of(dtype, letter, body.inputs))
    experts = b.input(f"experts{ending}", Tensor.of("i32", letter, 1))
    weights = b.input(f"weights{ending}", Tensor.of(dtype, letter, 1))
    order, offsets = b.add_many(Group(experts, experts=body.experts), (f"order{ending}", f"offsets{ending}"))
    rows = b.add(Gather(x, order, k=1), name=f"rows{ending}")
    out = _Lifter(b, body, dtype, ending).expert(rows, offsets)
    return b.add(Combine(out, order, weights), name=f"y{ending}")


def lift_moe(name: str, body: Body, *, slots: int | str, dtype: str, weight_dtype: str, on_input: bool) -> Region:
    """Region with inputs x [T, D], experts i32 [T, K], weights [T, K] and one output [T, O].

    `slots` is K, a letter when it varies.
    """
    b = Builder(name)
    lifter = _Lifter(b, body, dtype)
    x = b.input("x", Tensor.of(dtype, "T", body.inputs))
    experts = b.input("experts", Tensor.of("i32", "T", slots))
    weights = given = b.input("weights", Tensor.of(weight_dtype, "T", slots))
    order, offsets = b.add_many(Group(experts, experts=body.experts), ("order", "offsets"))
    rows = b.add(Gather(x, order, k=slots), name="rows")  # type: ignore[arg-type]
    if on_input:
        rows = b.add(ScaleRows(rows, order, weights), name="scaled")
        weights = b.add(Constant(value=1.0, type=weights.type), name="ones")
    out = lifter.expert(rows, offsets)
    y = b.add(Combine(out, order, weights), name="mixed" if body.identities else "y")
    if body.identities:
        same = IdentityRows(x, experts, given, first=body.experts, count=body.identities)
        y = b.add(Add(y, b.add(same, name="same")), name="y")
    return b.build(y)


def lift_chosen(name: str, body: Body, *, dtype: str, weight_dtype: str, on_input: bool) -> Region:
    """Expert choice: a region with inputs x [T, D], tokens i32 [E, C], weights [E, C] and one output [T, O]."""
    b = Builder(name)
    lifter = _Lifter(b, body, dtype)
    x = b.input("x", Tensor.of(dtype, "T", body.inputs))
    tokens = b.input("tokens", Tensor.of("i32", body.experts, "C"))
    weights = b.input("weights", Tensor.of(weight_dtype, body.experts, "C"))
    order, offsets = b.add_many(Group(tokens, experts=body.experts, by="expert"), ("order", "offsets"))
    rows = b.add(Gather(x, order, k=1), name="rows")
    if on_input:
        rows = b.add(ScaleRows(rows, order, weights, by="expert"), name="scaled")
        weights = b.add(Constant(value=1.0, type=weights.type), name="ones")
    out = lifter.expert(rows, offsets)
    return b.build(b.add(Combine(out, order, weights, by="expert", tokens=Dim.of("T")), name="y"))


def lift_routed(name: str, body: Body, route: Callable[[Builder, Value], tuple[Value, ...]], *, dtype: str) -> Region:
    """Region with inputs x [T, D], logits f32 [T, E] and what `route` adds, and one output [T, O].

    `route` adds the ops from logits to weights and experts [T, K], order and offsets.
    """
    b = Builder(name)
    lifter = _Lifter(b, body, dtype)
    x = b.input("x", Tensor.of(dtype, "T", body.inputs))
    weights, experts, order, offsets = route(b, b.input("logits", Tensor.of("f32", "T", body.experts)))
    slots = experts.type.shape[1].constant
    assert slots is not None
    rows = b.add(Gather(x, order, k=slots), name="rows")
    return b.build(b.add(Combine(lifter.expert(rows, offsets), order, weights), name="y"))


def lift_dense(name: str, body: Body, *, dtype: str) -> Region:
    """Region with input x [T, D] and one output [T, O]."""
    lifter = _Lifter(Builder(name), body, dtype)
    x = lifter.builder.input("x", Tensor.of(dtype, "T", body.inputs))
    return lifter.builder.build(lifter.expert(x, None))


def stage_views(bodies: Sequence[Body], prefix: str) -> dict[str, View | tuple[View, ...]]:
    """Where each weight reference of the region of several mixtures lives."""
    return {
        name + _ending(i): views
        for i, body in enumerate(bodies)
        for name, views in weight_views(body, prefix, dense=False).items()
    }


def weight_views(body: Body, prefix: str, *, dense: bool) -> dict[str, View | tuple[View, ...]]:
    """Where each weight reference of the lifted region lives, parameter names relative to `prefix`."""
    lead = f"{prefix}." if prefix else ""

    def local(bank: Bank) -> tuple[View, ...]:
        return tuple(View(v.param.removeprefix(lead), v.offset, v.shape, v.stride) for v in bank.views)

    names = weight_names(body)
    one = {role for role, bank in body.banks.items() if dense or bank.shared}
    return {names[role]: local(bank)[0] if role in one else local(bank) for role, bank in body.banks.items()}
