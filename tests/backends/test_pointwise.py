"""pointwise against Python's math, and with numbers beyond the finite ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moec.ir import Pointwise
from moec.ir.formula import UNARY, fold, parse_formula
from tests.backends import oracle_activations
from tests.backends.oracle_numbers import Sum, check_sum, listed
from tests.backends.running import evaluate_one
from tests.backends.shapes import each_float, some, strided

FORMULAS = [
    *(f"{fn}(a)" for fn in UNARY),
    "10 * tanh(a / 10) * sigmoid(a) * b",
    "min(max(a, -1.5), 1.5) - b",
    "square(relu(a)) + 3 * (a - b) / 7",
]
MORE: dict[str, Any] = {
    "exp": math.exp,
    "square": lambda x: x * x,
    "abs": abs,
    "neg": lambda x: -x,
    "min": min,
    "max": max,
}
ARITHMETIC: dict[str, Any] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / y,
}


def exact(formula: str, a: float, b: float) -> float:
    """The formula's value for two numbers."""

    def apply(fn: str, args: object) -> float:
        assert isinstance(args, list)
        if fn in MORE:
            return float(MORE[fn](*args))
        return float(ARITHMETIC[fn](*args)) if fn in ARITHMETIC else oracle_activations.function(fn, *args)

    return fold(parse_formula(formula), lambda at: {"a": a, "b": b}.get(at.fn, at.value), apply)


def operands(formula: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"a": a, "b": b} if "b" in parse_formula(formula).operands else {"a": a}


@pytest.mark.parametrize("formula", FORMULAS)
@each_float
def test_pointwise(formula: str, dtype: torch.dtype) -> None:
    a, b = some(5, 7, dtype=dtype, scale=2.0), some(5, 7, dtype=dtype)
    found = evaluate_one(Pointwise, operands(formula, a, b), formula=formula)
    assert found.dtype == dtype
    for number, x, y in zip(listed(found.flatten()), listed(a.flatten()), listed(b.flatten()), strict=True):
        want = exact(formula, x, y)
        check_sum(number, Sum(want, max(abs(want), abs(x), abs(y)), 24), dtype, f"{formula} of {x}, {y}")


def test_strides_do_not_matter() -> None:
    a, b = some(6, 4), some(6, 4)
    formula = FORMULAS[-1]
    plain = evaluate_one(Pointwise, {"a": a, "b": b}, formula=formula)
    for x, y in zip(strided(a), strided(b), strict=True):
        assert torch.equal(evaluate_one(Pointwise, {"a": x, "b": y}, formula=formula), plain)


def test_not_a_number_stays_where_it_is() -> None:
    a = torch.tensor([[float("nan"), 1.0], [2.0, 3.0]])
    found = evaluate_one(Pointwise, {"a": a}, formula="min(max(a, -1), 1) * tanh(a)")
    assert found.isnan().tolist() == [[True, False], [False, False]]
    far = evaluate_one(Pointwise, {"a": torch.tensor([1e30, -1e30])}, formula="10 * tanh(a / 10) * sigmoid(a)")
    assert far.tolist() == [10.0, 0.0]


def test_no_rows() -> None:
    assert evaluate_one(Pointwise, {"a": torch.zeros(0, 3)}, formula="tanh(a)").shape == (0, 3)
