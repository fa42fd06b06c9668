"""Layers of every form, drawn by hypothesis. T tokens, K choices, E experts, D model width, F expert width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from moec.ir import FUNCTIONS, FUSED_LAYOUTS, Act, Add, Constant, Region, Value, Weight
from moec.ir.rewrite import Rewriter
from tests.passes.layers import dense_layer, mixtral_layer

LAYOUTS = ("none", "pair", *FUSED_LAYOUTS)


@st.composite
def activations(draw: st.DrawFn, layout: str, functions: Sequence[str] = FUNCTIONS) -> dict[str, Any]:
    fn = draw(st.sampled_from(functions))
    given: dict[str, Any] = {"fn": fn}
    if fn == "silu":
        given["alpha"] = draw(st.sampled_from([1.0, 1.702]))
    if draw(st.booleans()):
        given |= {"limit": draw(st.sampled_from([0.5, 7.0])), "clamp_after": draw(st.booleans())}
    if layout != "none":
        given["up_shift"] = draw(st.sampled_from([0.0, 1.0]))
    return given


@st.composite
def moe_layers(draw: st.DrawFn, functions: Sequence[str] = FUNCTIONS) -> Region:
    e = draw(st.integers(1, 6))
    layout = draw(st.sampled_from(LAYOUTS))
    return mixtral_layer(
        "moe",
        e=e,
        k=draw(st.integers(1, min(e, 3))),
        d=draw(st.integers(1, 5)),
        f=draw(st.integers(1, 5)),
        bias=draw(st.booleans()),
        layout=layout,
        on_input=draw(st.sampled_from([False, False, True])),
        **draw(activations(layout, functions)),
    )


@st.composite
def dense_layers(draw: st.DrawFn) -> Region:
    layout = draw(st.sampled_from(LAYOUTS))
    d, f = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return dense_layer("ffn", d=d, f=f, bias=draw(st.booleans()), layout=layout, **draw(activations(layout)))


layers = moe_layers() | dense_layers()


@st.composite
def untidy(draw: st.DrawFn, region: Region) -> Region:
    """The layer with things that canonicalize takes away, at random places."""
    for _ in range(draw(st.integers(0, 4))):
        edit = Rewriter(region)
        node = draw(st.sampled_from([node for node in region.nodes if node.op.pure]))
        value = draw(st.sampled_from(node.results))
        edit.redirect(value, _same(draw(st.integers(0, 3)), edit, value))
        region = edit.finish()
    return region


untidy_layers = layers.flatmap(untidy)


def _same(kind: int, edit: Rewriter, value: Value) -> Value:
    """Another value that always equals this one."""
    node = edit.region.producer(value)
    assert node is not None
    weight = isinstance(node.op, Weight)
    if kind == 0 or weight or not value.type.is_float:
        return _again(edit, value)
    if kind == 1:
        return edit.add(Act(value, fn="identity"), "same", after=node)
    zero = edit.add(Constant(value=0.0, type=value.type), "zero", before=node)
    return edit.add(Add(value, zero) if kind == 2 else Add(zero, value), "same", after=node)


def _again(edit: Rewriter, value: Value) -> Value:
    """The same op once more; its first copy stays for the other results."""
    node = edit.region.producer(value)
    assert node is not None
    names = [f"{result.name}_again" for result in node.results]
    return edit.add_many(node.op, names, after=node)[node.results.index(value)]
