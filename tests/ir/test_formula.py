"""Formulas: their text, what is no formula, and how they bind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import MoecError
from moec.ir.formula import BINARY, UNARY, Formula, fold, number, parse_formula

LEAVES = st.one_of(st.sampled_from([Formula("a"), Formula("b")]), st.floats(-1e9, 1e9, allow_nan=False).map(number))
FORMULAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda fn, x: Formula(fn, (x,)), st.sampled_from(UNARY), inner),
        st.builds(lambda fn, x, y: Formula(fn, (x, y)), st.sampled_from([*BINARY, "+", "-", "*", "/"]), inner, inner),
    ),
    max_leaves=8,
)


@given(FORMULAS)
def test_text_is_the_formula(formula: Formula) -> None:
    assert parse_formula(str(formula)) == formula


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("10*tanh( a/10 )", "10 * tanh(a / 10)"),
        ("a - (b - 1)", "a - (b - 1)"),
        ("(a - b) - 1", "a - b - 1"),
        ("a * -2", "a * (-2)"),
        ("-a", "neg(a)"),
        ("min(max(a, -7.5), 7)", "min(max(a, -7.5), 7)"),
    ],
)
def test_text_is_canonical(text: str, same: str) -> None:
    assert str(parse_formula(text)) == same


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "invalid syntax"),
        ("a +", "invalid syntax"),
        ("c", "'c' is none of a, b, a number, + - * / and a function"),
        ("a ** 2", "'a ** 2' is none of"),
        ("__import__('os')", "is none of"),
        ("a.real", "'a.real' is none of"),
        ("True", "'True' is none of"),
        ("sinus(a)", "sinus is no function here"),
        ("tanh(a, b)", "tanh takes 1, found 2"),
        ("min(a)", "min takes 2, found 1"),
        ("tanh(" * 40 + "a" + ")" * 40, "more than 32 levels"),
    ],
)
def test_what_is_no_formula(text: str, why: str) -> None:
    with pytest.raises(MoecError) as caught:
        parse_formula(text)
    assert caught.value.code == "MOEC102"
    assert why in caught.value.message


def test_a_function_close_by_is_named() -> None:
    with pytest.raises(MoecError) as caught:
        parse_formula("sigmoidd(a)")
    assert "sigmoid" in str(caught.value.hint)


def test_folding_goes_through_all_of_it() -> None:
    seen: list[str] = []
    fold(parse_formula("a * tanh(b + 2)"), lambda at: seen.append(at.fn), lambda fn, args: seen.append(fn))
    assert seen == ["a", "b", "number", "+", "tanh", "*"]
    assert parse_formula("a * tanh(b + 2)").operands == {"a", "b"}
