"""Every code of the IR, triggered, with its exact text; and what the verifier lets pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from moec.errors import CODES, MoecError
from moec.ir import Combine, Linear, Node, Opaque, Region, Tensor, Value, verify
from tests.ir import errors_by_hand, errors_of_text
from tests.ir.build import moe
from tests.ir.errors_by_hand import X, Y, relu

ERRORS = [*errors_of_text.ERRORS, *errors_by_hand.ERRORS]


@pytest.mark.parametrize(("trigger", "text"), ERRORS, ids=[text.split("\n")[0] for _, text in ERRORS])
def test_error(trigger: Callable[[], object], text: str) -> None:
    with pytest.raises(MoecError) as caught:
        trigger()
    assert str(caught.value) == text.rstrip("\n")


def test_every_code_of_the_ir_is_triggered() -> None:
    assert {text[1:8] for _, text in ERRORS} == {code for code in CODES if code.startswith("MOEC1")}


def test_the_verifier_takes_what_is_merely_odd() -> None:
    """Inputs and nodes that nothing uses, an output twice, an input as output, an opaque graph that binds a letter."""
    dead = relu(X)
    verify(Region("r", (X, Value("unused", X.type)), (dead,), (X, X)))
    routed = Value("z", Tensor.of("i32", "N"))
    verify(Region("r", (X,), (Node((routed,), Opaque((X,), graph="g", types=(routed.type,))),), (routed,)))


def test_the_line_of_the_verifier_is_that_of_the_text() -> None:
    region = moe()
    for number, node in enumerate(region.nodes):
        broken = Node(tuple(replace(value, type=Tensor.of("bool")) for value in node.results), node.op)
        bad = replace(region, nodes=(*region.nodes[:number], broken, *region.nodes[number + 1 :]))
        with pytest.raises(MoecError) as caught:
            verify(bad)
        line = str(bad).split("\n")[number + 1].strip()
        assert caught.value.where == f"line {number + 2}: {line}"


def test_an_op_that_does_not_fit_names_its_op_once() -> None:
    with pytest.raises(MoecError) as caught:
        Linear(X, X, b=Y).result_types()
    assert caught.value.message == "linear: b must be [T] for weights f32[T, 64], found f32[T, 64]"
    with pytest.raises(MoecError) as caught:
        Combine(X, Y, Y).result_types()
    assert caught.value.message == "combine: order must hold i32 or i64, found f32[T, 64]"
