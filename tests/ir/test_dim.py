"""The algebra of sizes against plain arithmetic, its laws, its canonical form and its text."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moec.errors import MoecError
from moec.ir import Dim, ceildiv, floordiv, maximum, minimum
from tests.ir.expressions import LETTERS, SIZES, TREES, Tree

T, K, E = (Dim.of(letter) for letter in LETTERS)


def value(size: Dim, sizes: dict[str, int]) -> Fraction:
    """The value also where it is not whole."""
    scaled = size * 2**12 * 3**8
    return Fraction(scaled.evaluate(sizes), 2**12 * 3**8)


@settings(max_examples=300)
@given(TREES, SIZES)
def test_equals_plain_arithmetic(tree: Tree, sizes: dict[str, int]) -> None:
    assert value(tree.size(), sizes) == tree.value(sizes)


@settings(max_examples=200)
@given(TREES)
def test_text_reads_back(tree: Tree) -> None:
    size = tree.size()
    assert Dim.parse(str(size)) == size
    assert Dim.parse(str(tree)) == size
    assert hash(Dim.parse(str(size))) == hash(size)


@settings(max_examples=100)
@given(TREES, SIZES, st.sets(st.sampled_from(LETTERS)))
def test_substitute_then_evaluate(tree: Tree, sizes: dict[str, int], some: set[str]) -> None:
    size = tree.size()
    part = size.substitute({letter: sizes[letter] for letter in some})
    assert not part.letters & some
    assert value(part, sizes) == value(size, sizes)
    swapped = size.substitute({"T": Dim.parse("K + 1")})
    assert value(swapped, sizes) == value(size, sizes | {"T": sizes["K"] + 1})


@settings(max_examples=100)
@given(TREES, TREES, TREES)
def test_laws(a: Tree, b: Tree, c: Tree) -> None:
    x, y, z = a.size(), b.size(), c.size()
    assert x + y == y + x
    assert (x + y) + z == x + (y + z)
    assert x * y == y * x
    assert x * (y + z) == x * y + x * z
    assert x - x == Dim.of(0)
    assert minimum(x, y) == minimum(y, x)
    assert minimum(x, x) == x
    assert maximum(x, y) == -minimum(-x, -y)
    assert minimum(x, y) + z == minimum(x + z, y + z)


@settings(max_examples=100)
@given(TREES, st.integers(1, 12), st.integers(-3, 3))
def test_laws_of_division(tree: Tree, n: int, m: int) -> None:
    x = tree.size()
    whole = x * 4096  # whatever fractions occur, this has none
    assert floordiv(whole * n, n) == whole
    assert ceildiv(whole * n, n) == whole
    assert ceildiv(x, n) == -floordiv(-x, n)
    assert floordiv(x + m * n, n) == floordiv(x, n) + m
    assert floordiv(x * 3, n * 3) == floordiv(x, n)


@given(st.integers(-60, 60), st.integers(1, 16), st.integers(1, 16), st.integers(-20, 20))
def test_floor_and_ceil_of_one_letter_agree(a: int, b: int, c: int, d: int) -> None:
    """Two ways to write the same rounding compare equal."""
    x = a * T + d
    assert ceildiv(x, b) == floordiv(x + b - 1, b)
    assert floordiv(floordiv(x, b), c) == floordiv(x, b * c)
    assert ceildiv(ceildiv(x, b), c) == ceildiv(x, b * c)


EQUAL = [
    ("2T", "T + T"),
    ("floordiv(3T, 4)", "T - ceildiv(T, 4)"),
    ("floordiv(T*K, K)", "T"),
    ("floordiv(2T, 2E)", "floordiv(T, E)"),
    ("ceildiv(T, E)", "floordiv(T + E - 1, E)"),
    ("ceildiv(5/4*T*K, E)", "ceildiv(5T*K, 4E)"),
    ("ceildiv(ceildiv(5T, 32), 16)", "ceildiv(5T, 512)"),
    ("floordiv(T*(T + 1) + K, T + 1)", "T + floordiv(K, T + 1)"),
    ("min(T, 2T)", "T"),
    ("max(T, 0)", "T"),
    ("min(T, max(T, K))", "T"),
    ("max(T, min(T, K))", "T"),
    ("max(floordiv(T, 4), T)", "T"),
    ("max(T, K)", "T + K - min(T, K)"),
    ("min(min(T, K), E)", "min(T, min(E, K))"),
    ("min(2T, 2K)", "2*min(T, K)"),
    ("min(min(T, K) + 1, E + 1)", "min(E, K, T) + 1"),
    ("T/2 + T/2", "T"),
]


@pytest.mark.parametrize(("left", "right"), EQUAL)
def test_equal_sizes_compare_equal(left: str, right: str) -> None:
    assert Dim.parse(left) == Dim.parse(right)


def test_what_takes_too_many_steps_to_prove_stays() -> None:
    proven = Dim.parse("max(min(A, B) + min(C, D) + min(F, G), A + C + F)")
    assert str(proven) == "A + C + F"
    size = Dim.parse("max(min(A, B) + min(C, D) + min(F, G) + min(H, I) + min(L, M), A + C + F + H + L)")
    assert "max" in str(size)
    assert Dim.parse(str(size)) == size
    assert size.evaluate({letter: number for number, letter in enumerate("ABCDFGHILM")}) == 0 + 2 + 4 + 6 + 8


@pytest.mark.parametrize("text", ["max(floordiv(A - B, K), 0)", "max(E*floordiv(T - 3, K), 0)", "min(T - 1, 0)"])
def test_signs_that_letters_do_not_decide(text: str) -> None:
    size = Dim.parse(text)
    assert text[:3] in str(size)
    assert Dim.parse(str(size)) == size


UNEQUAL = [
    ("T", "K"),
    ("floordiv(T, 2)", "ceildiv(T, 2)"),
    ("min(T, K)", "max(T, K)"),
    ("ceildiv(T, E)", "floordiv(T, E)"),
]


@pytest.mark.parametrize(("left", "right"), UNEQUAL)
def test_unequal_sizes_do_not(left: str, right: str) -> None:
    assert Dim.parse(left) != Dim.parse(right)


PRINTED = {
    "0*T": "0",
    "T+T+3": "2T + 3",
    "T*2*K": "2K*T",
    "3 - T": "3 - T",
    "0 - T": "-T",
    "0 - T - 3": "-T - 3",
    "5/4*T": "5/4*T",
    "1/2": "1/2",
    "T*T*T": "T*T*T",
    "ceildiv(T, 4)": "ceildiv(T, 4)",
    "floordiv(T, 4)": "floordiv(T, 4)",
    "ceildiv(T, 2)": "ceildiv(T, 2)",
    "floordiv(T, 2)": "floordiv(T, 2)",
    "ceildiv(T, E)": "ceildiv(T, E)",
    "ceildiv(T + 1, 4)": "floordiv(T, 4) + 1",
    "16*ceildiv(ceildiv(5T, 32), 16)": "16*ceildiv(5T, 512)",
    "2*max(T, K)": "2*max(K, T)",
    "max(4, ceildiv(T, 8))": "max(4, ceildiv(T, 8))",
    "T - min(T, K)": "max(K, T) - K",
    "E*min(T, K)": "E*min(K, T)",
    "---T": "-T",
    "(T + 1)*(T - 1)": "T*T - 1",
}


@pytest.mark.parametrize(("text", "printed"), PRINTED.items())
def test_print(text: str, printed: str) -> None:
    assert str(Dim.parse(text)) == printed


def test_constants() -> None:
    assert Dim.of(4).constant == 4
    assert Dim.of(0).constant == 0
    assert (T - T).constant == 0
    assert T.constant is None
    assert Dim.of(Fraction(1, 2)).constant is None
    assert ceildiv(Fraction(5, 4) * Dim.of(8), 3).constant == 4
    assert Dim.of(T) is T


def test_operators_and_methods() -> None:
    assert 2 * T + 1 - T == T + 1 == 1 + T
    assert 5 - T == -T + 5
    assert T // 4 == T.floordiv(4) == floordiv(T, 4)
    assert floordiv(7, T) == 7 // T
    assert T.ceildiv(4) == ceildiv(T, 4)
    assert T.min(K, 3) == minimum(T, K, 3)
    assert T.max(K) == maximum(K, T)
    assert repr(2 * T) == "Dim('2T')"
    assert (2 * T * K + E).letters == {"T", "K", "E"}
    assert minimum(T // 2, K).letters == {"T", "K"}


def test_the_order_of_letters_does_not_matter() -> None:
    assert {T * K + E: 1} == {E + K * T: 1}


BAD_VALUES = [
    ("T", {}, "[MOEC108] size T: letter T has no value"),
    ("2Tok", {"Tokens": 1, "Tk": 2}, '[MOEC108] size 2Tok: letter Tok has no value\n  hint: did you mean "Tk"?'),
    ("T/2", {"T": 3}, "[MOEC108] size 1/2*T is not whole at T=3"),
    ("1/2", {}, "[MOEC108] size 1/2 is not whole"),
    ("floordiv(K, T)", {"T": 0, "K": 1}, "[MOEC108] size floordiv(K, T): divisor T is 0, not positive"),
    ("floordiv(K, T - 3)", {"T": 2, "K": 1}, "[MOEC108] size floordiv(K, T - 3): divisor T - 3 is -1, not positive"),
]


@pytest.mark.parametrize(("text", "sizes", "error"), BAD_VALUES)
def test_sizes_without_a_value(text: str, sizes: dict[str, int], error: str) -> None:
    with pytest.raises(MoecError) as caught:
        Dim.parse(text).evaluate(sizes)
    assert str(caught.value) == error


@pytest.mark.parametrize("divisor", [0, -2, Fraction(-1, 2)])
def test_division_by_what_is_not_positive(divisor: int | Fraction) -> None:
    with pytest.raises(MoecError) as caught:
        floordiv(T, divisor)
    assert str(caught.value) == f"[MOEC107] size divided by {divisor}\n  hint: divide by a positive size"


MALFORMED = [
    ("", "[MOEC107] expected a size, found end of text"),
    ("2 +", "[MOEC107] expected a size, found end of text"),
    ("t", '[MOEC107] "t" is neither a letter nor a function of sizes'),
    ("mim(T, 2)", '[MOEC107] "mim" is neither a letter nor a function of sizes'),
    ("min T", "[MOEC107] expected '(' after min, found 'T'"),
    ("min(T", "[MOEC107] expected ')' after the sizes of min, found end of text"),
    ("floordiv(T)", "[MOEC107] floordiv takes 2 sizes, found 1"),
    ("ceildiv(T, 2, 3)", "[MOEC107] ceildiv takes 2 sizes, found 3"),
    ("ceildiv(T, 0)", "[MOEC107] size divided by 0"),
    ("T/0", "[MOEC107] a size cannot be divided by 0"),
    ("T/K", "[MOEC107] expected a number after '/', found 'K'"),
    ("1.5T", "[MOEC107] expected a whole number of at most 18 digits, found '1.5'"),
    ("9" * 19, f"[MOEC107] expected a whole number of at most 18 digits, found '{'9' * 19}'"),
    ("T T", "[MOEC107] expected an operator or the end of the size, found 'T'"),
    ("(T", "[MOEC107] expected ')' after a size in parentheses, found end of text"),
    ("T ? 2", "[MOEC107] unexpected character '?'"),
    ("(" * 70 + "T" + ")" * 70, "[MOEC107] size nested more than 64 deep"),
    ("*".join(["(A + B + C + D)"] * 12), "[MOEC107] size with more than 256 terms"),
    ("max(" + ", ".join(f"min(A{i}, B{i})" for i in range(12)) + ")", "[MOEC107] size with more than 256 terms"),
]


@pytest.mark.parametrize(("text", "error"), MALFORMED)
def test_malformed_text(text: str, error: str) -> None:
    with pytest.raises(MoecError) as caught:
        Dim.parse(text)
    assert str(caught.value).startswith(error)


def test_malformed_text_has_a_caret_and_a_hint() -> None:
    with pytest.raises(MoecError) as caught:
        Dim.parse("2T + mim(T, 4)")
    assert str(caught.value) == (
        '[MOEC107] "mim" is neither a letter nor a function of sizes\n'
        "  at line 1, column 6: 2T + mim(T, 4)\n"
        "                            ^^^\n"
        '  hint: did you mean "min"?'
    )


@given(st.text(alphabet="TKE0123456789+-*/(), minaxfloredvc", max_size=30))
def test_any_text_is_a_size_or_an_error(text: str) -> None:
    try:
        size = Dim.parse(text)
    except MoecError:
        return
    assume(len(str(size)) < 1000)
    assert Dim.parse(str(size)) == size
