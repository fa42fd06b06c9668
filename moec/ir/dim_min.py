"""The least and the greatest of sizes, in canonical form, and what signs prove about sizes."""

import math
from fractions import Fraction

from moec.ir.dim import (
    Atom,
    Dim,
    Floor,
    Min,
    Monomial,
    Number,
    as_dim,
    check_terms,
    content,
    from_terms,
    of_atom,
    only_atom,
)


def minimum(*sizes: Number | Dim) -> Dim:
    """The least of the sizes; what is provably not the least is left out."""
    assert sizes, "minimum of nothing"
    args = _flat_min([as_dim(size) for size in sizes])
    args = _without_larger(args)
    if len(args) == 1:
        return args[0]
    # What all have in common moves out: min(T + 1, K + 1) is min(T, K) + 1.
    monomials = {monomial for arg in args for monomial, _ in arg.terms}
    common = from_terms({m: min(dict(arg.terms).get(m, Fraction(0)) for arg in args) for m in monomials})
    rest = [arg - common for arg in args]
    if any(_linear_min(arg) for arg in rest):  # moving it out has made a -min(...) in one a +min(...) in another
        return common + minimum(*rest)
    scale = content(rest)
    return common + scale * of_atom(
        Min(tuple(sorted((arg * (1 / scale) for arg in rest), key=lambda size: size.sort_key)))
    )


def maximum(*sizes: Number | Dim) -> Dim:
    """The greatest of the sizes."""
    return -minimum(*(-as_dim(size) for size in sizes))


def _flat_min(sizes: list[Dim]) -> list[Dim]:
    """min(a, b) + r among the sizes counts as two of them, a + r and b + r."""
    flat: dict[Dim, None] = {}
    for size in sizes:
        found = _linear_min(size)
        if found is None:
            flat[size] = None
            continue
        monomial, coefficient, atom = found
        rest = size - Dim(((monomial, coefficient),))
        flat.update(dict.fromkeys(_flat_min([coefficient * arg + rest for arg in atom.args])))
        check_terms(len(flat))
    return list(flat)


def _linear_min(size: Dim) -> tuple[Monomial, Fraction, Min] | None:
    """A term of the size that is a positive number times a Min."""
    return next(((m, c, atom) for m, c in size.terms if c > 0 and isinstance(atom := only_atom(m), Min)), None)


def _without_larger(sizes: list[Dim]) -> list[Dim]:
    # One at a time and in a fixed order, so that of sizes that are provably equal exactly one stays.
    kept = sorted(sizes, key=lambda size: size.sort_key)
    for size in reversed(kept.copy()):
        if any(at_least(size, other) for other in kept if other is not size):
            kept.remove(size)
    return kept


def at_least(a: Dim, b: Dim) -> bool:
    """Whether a >= b for all sizes, as far as the signs of the terms show it."""
    low = lower_bound(a - b)
    return low is not None and low >= 0


def lower_bound(size: Dim, depth: int = 4) -> Fraction | None:
    """A number that the size never falls below (letters are at least 0, divisors at least 1), or None if unknown."""
    if depth == 0:  # each step below tries several sizes; what takes more steps stays unknown
        return None
    for monomial, coefficient in size.terms:
        most = _at_most(only_atom(monomial)) if coefficient < 0 else []
        if most:  # -min(a, b) is at least -a and at least -b
            rest = size - Dim(((monomial, coefficient),))
            lows = [lower_bound(rest + coefficient * other, depth - 1) for other in most]
            return max((low for low in lows if low is not None), default=None)
    total = Fraction(0)
    for monomial, coefficient in size.terms:
        low = _monomial_lower_bound(monomial)
        if low is None or (coefficient < 0 and monomial):
            return None
        total += coefficient * low
    return total


def _at_most(atom: Atom | None) -> list[Dim]:
    """Sizes that the atom never exceeds."""
    if isinstance(atom, Min):
        return list(atom.args)
    if isinstance(atom, Floor) and atom.den.constant is not None:
        return [atom.num * Fraction(1, atom.den.constant)]
    return []


def _monomial_lower_bound(monomial: Monomial) -> Fraction | None:
    if (atom := only_atom(monomial)) is not None:
        return _atom_lower_bound(atom)
    product = Fraction(1)
    for factor, power in monomial:
        low = _atom_lower_bound(factor)
        if low is None or low < 0:
            return None
        product *= low**power
    return product


def _atom_lower_bound(atom: Atom) -> Fraction | None:
    if isinstance(atom, str):
        return Fraction(0)
    if isinstance(atom, Min):
        return _least([lower_bound(arg) for arg in atom.args])
    low = lower_bound(atom.num)
    if low is None:
        return None
    if atom.den.constant is not None:
        return Fraction(low // atom.den.constant)
    return Fraction(0) if low >= 0 else Fraction(math.floor(low))


def _least(lows: list[Fraction | None]) -> Fraction | None:
    known = [low for low in lows if low is not None]
    return min(known) if len(known) == len(lows) else None
