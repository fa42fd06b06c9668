"""Integers of two or more shapes become size expressions, or are refused: never a guess that fails on another shape."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moec.frontends.torch.sizes import Size, solve

SHAPES = [(2, 20, 8), (3, 7, 8), (5, 4, 8), (1, 11, 8)]


def at(expression: int | Size | None, shape: tuple[int, ...]) -> int:
    assert expression is not None
    return expression if isinstance(expression, int) else expression(shape)


@pytest.mark.parametrize("value", [0, 1, 8, -1])
def test_a_constant_stays(value: int) -> None:
    assert solve([value] * 4, SHAPES) == value


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2, 3, 5, 1], Size((0,), Fraction(1), 0)),
        ([20, 7, 4, 11], Size((1,), Fraction(1), 0)),
        ([40, 21, 20, 11], Size((0, 1), Fraction(1), 0)),
        ([80, 42, 40, 22], Size((0, 1), Fraction(2), 0)),
        ([19, 6, 3, 10], Size((1,), Fraction(1), -1)),
        ([41, 22, 21, 12], Size((0, 1), Fraction(1), 1)),
    ],
    ids=["batch", "length", "tokens", "rows", "length - 1", "tokens + 1"],
)
def test_expressions_people_write(values: list[int], expected: Size) -> None:
    assert solve(values, SHAPES) == expected


@pytest.mark.parametrize(
    "values", [[40, 21, 20, 12], [4, 9, 25, 1], [1, 2, 3, 4], [10, 3, 2, 5], [39, 13, 7, 21], [0, 21, 20, 11]]
)
def test_anything_else_is_refused(values: list[int]) -> None:
    """One run off; a square; a counter; a floor division; a line with a slope and an offset; a zero."""
    assert solve(values, SHAPES) is None


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=3, max_size=5, unique=True),
    st.sampled_from([(0,), (1,), (0, 1)]),
    st.integers(1, 12),
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
def test_products_hold_at_shapes_not_seen(
    shapes: list[tuple[int, int]], factors: tuple[int, ...], scale: int, unseen: tuple[int, int]
) -> None:
    """Where the runs tell the sizes apart, what is found is what was meant."""
    products = [tuple(math.prod(s[i] for i in c) for s in shapes) for c in ((0,), (1,), (0, 1))]
    for i, a in enumerate(products):
        assume(len(set(a)) > 1)
        for b in products[i + 1 :]:
            assume(len({Fraction(x, y) for x, y in zip(a, b, strict=True)}) > 1)
    values = [scale * math.prod(s[i] for i in factors) for s in shapes]
    assert at(solve(values, shapes), unseen) == scale * math.prod(unseen[i] for i in factors)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=2, max_size=5),
    st.lists(st.integers(-5, 90), min_size=2, max_size=5),
)
def test_what_is_found_holds_for_all_runs(shapes: list[tuple[int, int]], values: list[int]) -> None:
    count = min(len(shapes), len(values))
    shapes, values = shapes[:count], values[:count]
    found = solve(values, shapes)
    if found is not None:
        assert [at(found, s) for s in shapes] == values
        assert isinstance(found, int) or found.scale != 0
    elif len(set(values)) == 1:
        raise AssertionError("a constant was refused")


@given(st.integers(-4, 4), st.sampled_from([(0,), (1,), (0, 1)]))
def test_offsets_from_a_size(shift: int, factors: tuple[int, ...]) -> None:
    values = [math.prod(s[i] for i in factors) + shift for s in SHAPES]
    found = solve(values, SHAPES)
    assert at(found, (6, 50, 8)) == math.prod((6, 50, 8)[i] for i in factors) + shift


def test_sizes_that_do_not_vary_are_no_letters() -> None:
    assert solve([16, 16], [(2, 8), (3, 8)]) == 16
    assert solve([16, 24], [(2, 8), (3, 8)]) == Size((0,), Fraction(8), 0)
