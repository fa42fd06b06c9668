"""Symbolic sizes: polynomials over letters with rational coefficients, floor division and minimum, in canonical form.

A letter is a non-negative integer that is fixed when a layer is called (T tokens). Equal expressions compare equal
wherever the rules below prove it: sums and products are multiplied out and sorted; whole multiples leave a division
(`floordiv(T + 4, 4)` is `floordiv(T, 4) + 1`); `ceildiv` and `max` are kept as `floordiv` and `min` of the opposite
sign, and only printed by their own names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from moec.errors import MoecError, did_you_mean

Number = int | Fraction
Monomial = tuple[tuple["Atom", int], ...]
Terms = tuple[tuple[Monomial, Fraction], ...]
# Only ever compared with other keys; atoms nest, so the type is recursive.
Key = tuple[object, ...]
MAX_TERMS = 256


@dataclass(frozen=True)
class Floor:
    """floor(num / den); both have whole coefficients, so the value is an integer."""

    num: Dim
    den: Dim


@dataclass(frozen=True)
class Min:
    """The least of at least two different sizes with whole coefficients, sorted."""

    args: tuple[Dim, ...]


Atom = str | Floor | Min


@dataclass(frozen=True)
class Dim:
    """An immutable symbolic size. Make one with `Dim.of(4)`, `Dim.of("T")` or `Dim.parse("ceildiv(5T, 4)")`."""

    terms: Terms

    @staticmethod
    def of(size: int | Fraction | str | Dim) -> Dim:
        """A size from a number, from text, or from a size. Raises MOEC107 for malformed text."""
        if isinstance(size, Dim):
            return size
        if isinstance(size, str):
            return Dim.parse(size)
        return from_terms({(): Fraction(size)})

    @staticmethod
    def parse(text: str) -> Dim:
        """Read what `str` prints: `2T + 3`, `5/4*T*K`, `ceildiv(T, 8)`, `min(T, C)`. Raises MOEC107."""
        from moec.ir.dim_text import parse_dim  # written in terms of this class, like the others below

        return parse_dim(text)

    def __str__(self) -> str:
        from moec.ir.dim_text import print_dim

        return print_dim(self)

    def __repr__(self) -> str:
        return f"Dim({str(self)!r})"

    @property
    def constant(self) -> int | None:
        """The value when no letter occurs and it is whole, else None."""
        if not self.terms:
            return 0
        if len(self.terms) == 1 and self.terms[0][0] == () and self.terms[0][1].denominator == 1:
            return int(self.terms[0][1])
        return None

    @property
    def letters(self) -> frozenset[str]:
        """The letters the size depends on."""
        return frozenset(letter for monomial, _ in self.terms for atom, _ in monomial for letter in _letters(atom))

    @property
    def sort_key(self) -> Key:
        """A total order on sizes, for canonical forms."""
        return tuple((monomial_key(monomial), coefficient) for monomial, coefficient in self.terms)

    def __add__(self, other: Number | Dim) -> Dim:
        total = dict(self.terms)
        for monomial, coefficient in as_dim(other).terms:
            total[monomial] = total.get(monomial, Fraction(0)) + coefficient
        return from_terms(total)

    def __mul__(self, other: Number | Dim) -> Dim:
        product: dict[Monomial, Fraction] = {}
        for left, a in self.terms:
            for right, b in as_dim(other).terms:
                monomial = _times(left, right)
                product[monomial] = product.get(monomial, Fraction(0)) + a * b
        check_terms(len(product))
        return from_terms(product)

    def __neg__(self) -> Dim:
        return Dim(tuple((monomial, -coefficient) for monomial, coefficient in self.terms))

    def __sub__(self, other: Number | Dim) -> Dim:
        return self + -as_dim(other)

    def __rsub__(self, other: Number) -> Dim:
        return as_dim(other) - self

    __radd__ = __add__
    __rmul__ = __mul__

    def __floordiv__(self, other: Number | Dim) -> Dim:
        return self.floordiv(other)

    def __rfloordiv__(self, other: Number) -> Dim:
        return as_dim(other).floordiv(self)

    def floordiv(self, other: Number | Dim) -> Dim:
        """self / other rounded down. Raises MOEC107 when other is a constant that is not positive."""
        from moec.ir.dim_floor import floordiv

        return floordiv(self, other)

    def ceildiv(self, other: Number | Dim) -> Dim:
        """self / other rounded up. Raises MOEC107 when other is a constant that is not positive."""
        return -(-self).floordiv(other)

    def min(self, *others: Number | Dim) -> Dim:
        """The least of self and others."""
        from moec.ir.dim_min import minimum

        return minimum(self, *others)

    def max(self, *others: Number | Dim) -> Dim:
        """The greatest of self and others."""
        from moec.ir.dim_min import maximum

        return maximum(self, *others)

    def evaluate(self, sizes: Mapping[str, int]) -> int:
        """The value when each letter has the given size. Raises MOEC108 for a letter without a size, a divisor that
        is not positive and a value that is not whole."""
        value = self._value(sizes)
        if value.denominator != 1:
            at = ", ".join(f"{letter}={sizes[letter]}" for letter in sorted(self.letters))
            raise MoecError("MOEC108", f"size {self} is not whole{' at ' + at if at else ''}")
        return int(value)

    def _value(self, sizes: Mapping[str, int]) -> Fraction:
        total = Fraction(0)
        for monomial, coefficient in self.terms:
            value = coefficient
            for atom, power in monomial:
                value *= self._atom_value(atom, sizes) ** power
            total += value
        return total

    def _atom_value(self, atom: Atom, sizes: Mapping[str, int]) -> Fraction:
        if isinstance(atom, str):
            if atom not in sizes:
                raise MoecError("MOEC108", f"size {self}: letter {atom} has no value", hint=did_you_mean(atom, sizes))
            return Fraction(sizes[atom])
        if isinstance(atom, Min):
            return min(arg._value(sizes) for arg in atom.args)
        divisor = atom.den._value(sizes)
        if divisor <= 0:
            raise MoecError("MOEC108", f"size {self}: divisor {atom.den} is {divisor}, not positive")
        return Fraction(atom.num._value(sizes) // divisor)

    def substitute(self, sizes: Mapping[str, int | Dim]) -> Dim:
        """The size with letters replaced; letters that are not in `sizes` stay."""
        total = Dim(())
        for monomial, coefficient in self.terms:
            product = from_terms({(): coefficient})
            for atom, power in monomial:
                for _ in range(power):
                    product = product * _substitute_atom(atom, sizes)
            total = total + product
        return total


def _substitute_atom(atom: Atom, sizes: Mapping[str, int | Dim]) -> Dim:
    if isinstance(atom, str):
        return as_dim(sizes[atom]) if atom in sizes else letter(atom)
    if isinstance(atom, Min):
        first, *others = (arg.substitute(sizes) for arg in atom.args)
        return first.min(*others)
    return atom.num.substitute(sizes).floordiv(atom.den.substitute(sizes))


def letter(name: str) -> Dim:
    """The size that a letter stands for."""
    return of_atom(name)


def check_terms(count: int) -> None:
    """MOEC107 for a size that nobody can have meant; multiplying out would otherwise take forever."""
    if count > MAX_TERMS:
        raise MoecError("MOEC107", f"size with more than {MAX_TERMS} terms", hint="use a letter for a part of it")


def from_terms(terms: Mapping[Monomial, Fraction]) -> Dim:
    """A size from its terms: sorted, without zeros."""
    kept = [(monomial, coefficient) for monomial, coefficient in terms.items() if coefficient]
    return Dim(tuple(sorted(kept, key=lambda term: monomial_key(term[0]))))


def content(sizes: Iterable[Dim]) -> Fraction:
    """The greatest positive number that divides every coefficient; at least one size is not 0."""
    coefficients = [coefficient for size in sizes for _, coefficient in size.terms]
    return Fraction(
        math.gcd(*(c.numerator for c in coefficients)),
        math.lcm(*(c.denominator for c in coefficients)),
    )


def monomial_key(monomial: Monomial) -> Key:
    """Higher degree first, then by atom; a graded order, so that division below has one answer."""
    return (-sum(power for _, power in monomial), tuple(_atom_key(atom) for atom, n in monomial for _ in range(n)))


def _atom_key(atom: Atom) -> Key:
    if isinstance(atom, str):
        return (0, atom)
    if isinstance(atom, Floor):
        return (1, atom.num.sort_key, atom.den.sort_key)
    return (2, tuple(arg.sort_key for arg in atom.args))


def as_dim(size: Number | Dim) -> Dim:
    return size if isinstance(size, Dim) else Dim.of(size)


def of_atom(atom: Atom) -> Dim:
    """The size that is just this atom."""
    return Dim(((((atom, 1),), Fraction(1)),))


def _letters(atom: Atom) -> frozenset[str]:
    if isinstance(atom, str):
        return frozenset((atom,))
    parts = atom.args if isinstance(atom, Min) else (atom.num, atom.den)
    return frozenset().union(*(part.letters for part in parts))


def _times(left: Monomial, right: Monomial) -> Monomial:
    powers = dict(left)
    for atom, power in right:
        powers[atom] = powers.get(atom, 0) + power
    return tuple(sorted(powers.items(), key=lambda item: _atom_key(item[0])))


def only_atom(monomial: Monomial) -> Atom | None:
    """The atom when the monomial is just that, else None."""
    return monomial[0][0] if len(monomial) == 1 and monomial[0][1] == 1 else None
