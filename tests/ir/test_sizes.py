"""Letters read off the shapes of a call."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import MoecError
from moec.ir import Dim, Tensor, Value, bind_sizes
from tests.ir.build import values


def bound(types: str, *shapes: tuple[int, ...]) -> dict[str, int]:
    return bind_sizes(list(values(types).values()), shapes)


BOUND = [
    ("x: f32[T, 64], e: i32[T, 2]", [(5, 64), (5, 2)], {"T": 5}),
    ("x: f32[T, 64]", [(0, 64)], {"T": 0}),
    ("x: f32[2T + 1]", [(7,)], {"T": 3}),
    ("x: f32[T*K], y: f32[K]", [(12,), (3,)], {"T": 4, "K": 3}),
    ("x: f32[ceildiv(T, 4), T]", [(2, 5)], {"T": 5}),
    ("x: f32[min(T, K)], y: f32[T, K]", [(3,), (5, 3)], {"T": 5, "K": 3}),
    ("x: f32[]", [()], {}),
]


@pytest.mark.parametrize(("types", "shapes", "sizes"), BOUND)
def test_bound(types: str, shapes: list[tuple[int, ...]], sizes: dict[str, int]) -> None:
    assert bound(types, *shapes) == sizes


UNFIT = [
    ("x: f32[T, 64]", [(5,)], "%x must be f32[T, 64], found shape [5]"),
    ("x: f32[T, 64]", [(5, 63)], "%x is f32[T, 64]: expected 64, found 63"),
    ("x: f32[T], y: f32[T]", [(5,), (4,)], "%y is f32[T]: T is 5, found 4"),
    ("x: f32[T], y: f32[2T]", [(5,), (9,)], "%y is f32[2T]: 2T is 10 with T=5, found 9"),
    ("x: f32[2T]", [(9,)], "%x is f32[2T]: no T makes 2T = 9"),
    ("x: f32[T + 4]", [(3,)], "%x is f32[T + 4]: no T makes T + 4 = 3"),
    ("x: f32[T*K]", [(6,)], "%x: the size of K does not follow from K*T = 6"),
    ("x: f32[T*T]", [(9,)], "%x: the size of T does not follow from T*T = 9"),
    ("x: f32[floordiv(T, 2)]", [(2,)], "%x: the size of T does not follow from floordiv(T, 2) = 2"),
]


@pytest.mark.parametrize(("types", "shapes", "message"), UNFIT)
def test_unfit(types: str, shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(MoecError) as caught:
        bound(types, *shapes)
    assert (caught.value.code, caught.value.message) == ("MOEC109", message)


@given(st.integers(0, 50), st.integers(1, 50), st.integers(1, 9), st.integers(0, 9))
def test_binding_inverts_evaluating(t: int, k: int, a: int, b: int) -> None:
    types = [Tensor("f32", (Dim.of("T") * Dim.of("K"), Dim.of("K") * a + b)), Tensor.of("f32", "max(T, K)")]
    inputs = [Value(f"x{at}", type) for at, type in enumerate(types)]
    sizes = {"T": t, "K": k}
    assert bind_sizes(inputs, [type.evaluate(sizes) for type in types]) == sizes
