"""Rewriting: what is added, replaced and redirected; types that follow; dead nodes that go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moec.errors import MoecError
from moec.ir import (
    Act,
    Glu,
    GroupedLinear,
    QuantizeWeight,
    Rewriter,
    ScaleRows,
    Tensor,
    Value,
    Weight,
    drop_dead,
    parse,
    substitute,
    verify,
)
from tests.ir.build import moe

CHAIN = """\
region chain(%x: f32[T, 8]) {
  %a = act(%x) {fn="identity"} : f32[T, 8]
  %b = act(%a) {fn="relu"} : f32[T, 8]
  %c = act(%b) {fn="identity"} : f32[T, 8]
  return %c, %b
}"""


def test_redirect_drops_what_became_dead() -> None:
    region = parse(CHAIN)
    edit = Rewriter(region)
    for node in region.nodes:
        if isinstance(node.op, Act) and node.op.fn == "identity":
            edit.redirect(node.results[0], edit.current(node).op.operands[0])
    expected = """\
region chain(%x: f32[T, 8]) {
  %b = act(%x) {fn="relu"} : f32[T, 8]
  return %b, %b
}"""
    assert str(edit.finish()) == expected
    assert str(region) == CHAIN


def test_add_before_and_after_makes_names_unique() -> None:
    region = parse(CHAIN)
    edit = Rewriter(region)
    second = region.nodes[1]
    new = edit.add(Act(second.results[0], fn="tanh"), "b", after=second)
    edit.redirect(second.results[0], new)
    early = edit.add(Act(region.inputs[0], fn="silu"), "x", before=region.nodes[0])
    edit.redirect(region.inputs[0], early)
    expected = """\
region chain(%x: f32[T, 8]) {
  %x_2 = act(%x) {fn="silu"} : f32[T, 8]
  %a = act(%x_2) {fn="identity"} : f32[T, 8]
  %b = act(%a) {fn="relu"} : f32[T, 8]
  %b_2 = act(%b) {fn="tanh"} : f32[T, 8]
  %c = act(%b_2) {fn="identity"} : f32[T, 8]
  return %c, %b_2
}"""
    assert str(edit.finish()) == expected


def test_types_follow_a_replaced_op() -> None:
    region = parse(CHAIN)
    edit = Rewriter(region)
    edit.replace_op(region.nodes[0], Glu(region.inputs[0], fn="identity", layout="concat"))
    after = edit.finish()
    assert [str(value.type) for node in after.nodes for value in node.results] == ["f32[T, 4]"] * 3
    verify(after)


def test_types_that_no_longer_fit_are_an_error() -> None:
    region = moe()
    edit = Rewriter(region)
    edit.replace_op(region.nodes[1], Glu(region.inputs[0], fn="silu", layout="concat"))
    with pytest.raises(MoecError) as caught:
        edit.finish()
    assert caught.value.message == "grouped_linear: the inputs of w must be 32 like the rows of f32[T, 32], found 64"


def test_quantize_in_place() -> None:
    region = moe()
    edit = Rewriter(region)
    for node in region.nodes:
        if isinstance(node.op, Weight):
            q, scale = edit.add_many(QuantizeWeight(node.results[0]), ("q", "scale"), after=node)
            for user in region.users(node.results[0]):
                op = edit.current(user).op
                assert isinstance(op, GroupedLinear)
                edit.replace_op(user, replace(op, w=q, scale=scale))
    after = edit.finish()
    assert [str(node) for node in after.nodes[2:5]] == [
        '%w_gate_up = weight {ref="gate_up"} : f32[8, 96, 64]',
        "%q, %scale = quantize_weight(%w_gate_up) : i8[8, 96, 64], f32[8, 96]",
        "%h = grouped_linear(%rows, %offsets, %q, scale=%scale) : f32[2T, 96]",
    ]
    assert parse(str(after)) == after


def test_an_op_that_takes_what_it_replaces_keeps_it() -> None:
    region = moe()
    rows, order, weights = region.nodes[1].results[0], region.nodes[0].results[0], region.inputs[2]
    edit = Rewriter(region)
    edit.redirect(rows, edit.add(ScaleRows(rows, order, weights), "scaled", after=region.nodes[1]))
    after = edit.finish()
    assert str(after.nodes[2].op.operands[0]) == "%rows"
    assert str(after.nodes[4].op.operands[0]) == "%scaled"


def test_bugs_of_a_pass_are_assertions() -> None:
    region = parse(CHAIN)
    edit = Rewriter(region)
    with pytest.raises(AssertionError, match="defines 1 values, not 2"):
        edit.add_many(Act(region.inputs[0], fn="relu"), ("a", "b"))
    with pytest.raises(AssertionError, match="not both"):
        edit.add(Act(region.inputs[0], fn="relu"), before=region.nodes[0], after=region.nodes[0])
    with pytest.raises(AssertionError, match="no node of this region defines %order"):
        edit.current(moe().nodes[0])


def test_using_a_value_before_its_definition_is_an_error() -> None:
    region = parse(CHAIN)
    edit = Rewriter(region)
    late = edit.add(Act(region.inputs[0], fn="tanh"), "late")
    edit.redirect(region.nodes[0].results[0], late)
    with pytest.raises(MoecError) as caught:
        edit.finish()
    assert caught.value.message == "act: %late is not defined"


def test_drop_dead_keeps_what_is_not_pure() -> None:
    region = parse(
        """\
region r(%x: f32[T]) {
  %dead = act(%x) {fn="relu"} : f32[T]
  %kept = act(%x) {fn="tanh"} : f32[T]
  %count = opaque(%kept) {graph="count"} : i32[]
  return %x
}"""
    )
    assert [node.results[0].name for node in drop_dead(region).nodes] == ["kept", "count"]


def test_substitute() -> None:
    region = parse(CHAIN)
    a, x = region.nodes[0].results[0], region.inputs[0]
    after = substitute(region, {a: x, region.nodes[2].results[0]: a})
    assert after.nodes[1].op == Act(x, fn="relu")
    assert after.outputs == (a, region.nodes[1].results[0])
    other = Value("x", Tensor.of("f32"))  # the same name, another type: another value
    assert substitute(region, {other: a}) == region
