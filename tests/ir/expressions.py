"""Random sizes as trees, with plain integer arithmetic as the judge of the algebra."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from hypothesis import strategies as st

from moec.ir import Dim, ceildiv, floordiv, maximum, minimum

LETTERS = ("T", "K", "E")


_ARITHMETIC: Mapping[str, Callable[[Fraction, Fraction], Fraction | int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "ceildiv": lambda a, b: -(-a // b),
    "min": min,
    "max": max,
}


_ALGEBRA: Mapping[str, Callable[[Dim, Dim], Dim]] = {
    "+": Dim.__add__,
    "-": Dim.__sub__,
    "*": Dim.__mul__,
    "floordiv": floordiv,
    "ceildiv": ceildiv,
    "min": minimum,
    "max": maximum,
}


@dataclass(frozen=True)
class Tree:
    """A letter, a number, or an operation on trees."""

    operation: str
    args: tuple[Tree, ...] = ()
    leaf: str | Fraction = ""

    def size(self) -> Dim:
        """The tree through the algebra."""
        if not self.args:
            return Dim.of(self.leaf)
        first, second = (arg.size() for arg in self.args)
        return _ALGEBRA[self.operation](first, second)

    def value(self, sizes: Mapping[str, int]) -> Fraction:
        """The tree by plain arithmetic."""
        if isinstance(self.leaf, Fraction):
            return self.leaf
        if self.leaf:
            return Fraction(sizes[self.leaf])
        a, b = (arg.value(sizes) for arg in self.args)
        return Fraction(_ARITHMETIC[self.operation](a, b))

    def __str__(self) -> str:
        if not self.args:
            return str(self.leaf)
        a, b = map(str, self.args)
        return f"({a} {self.operation} {b})" if self.operation in "+-*" else f"{self.operation}({a}, {b})"


def _leaf(value: str | Fraction) -> Tree:
    return Tree("leaf", (), value)


NUMBERS = st.builds(Fraction, st.integers(0, 9), st.sampled_from([1, 1, 1, 2, 4]))
LEAVES = st.one_of(st.sampled_from(LETTERS), NUMBERS).map(_leaf)
# Sizes that are at least 1 when letters are: what one divides by.
DIVISORS = st.one_of(st.sampled_from(LETTERS), st.builds(Fraction, st.integers(1, 9))).map(_leaf)


def _grown(trees: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    whole = st.builds(lambda op, a, b: Tree(op, (a, b)), st.sampled_from(["+", "-", "*", "min", "max"]), trees, trees)
    divided = st.builds(
        lambda op, a, b: Tree(op, (a, b)),
        st.sampled_from(["floordiv", "ceildiv"]),
        trees,
        st.one_of(DIVISORS, st.builds(lambda a, b: Tree("+", (a, b)), DIVISORS, DIVISORS)),
    )
    return st.one_of(whole, divided)


TREES = st.recursive(LEAVES, _grown, max_leaves=6)
SIZES = st.fixed_dictionaries({letter: st.integers(1, 12) for letter in LETTERS})
# Sizes as they occur in types: small, whole, not negative for letters of at least 1.
SHAPE_SIZES = st.one_of(
    st.integers(1, 64).map(Dim.of),
    st.sampled_from(["T", "2T", "T*K", "E + 1", "ceildiv(5T, 16)", "min(T, C)", "max(4, ceildiv(2T, E))"]).map(
        Dim.parse
    ),
)
