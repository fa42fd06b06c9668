"""Division of sizes, rounded down or up, in canonical form."""

import math
from fractions import Fraction

from moec.errors import MoecError
from moec.ir.dim import Dim, Floor, Key, Monomial, Number, as_dim, content, from_terms, monomial_key, of_atom, only_atom


def floordiv(a: Number | Dim, b: Number | Dim) -> Dim:
    """a / b rounded down. Raises MOEC107 when b is a constant that is not positive."""
    num, den = as_dim(a), as_dim(b)
    _check_divisor(den)
    num, den = _scaled_whole(num, den)
    if (merged := _merged(num, den)) is not None:
        return merged
    quotient, num = _divide(num, den)
    num, den = _reduced(num, den)
    if not any(monomial for monomial, _ in num.terms) and den.constant is not None:
        return quotient + math.floor(Fraction(num.constant or 0) / den.constant)
    if (merged := _merged(num, den)) is not None:
        return quotient + merged
    # floor(x/d) = -floor((-x + d - 1)/d): of the two ways to write it keep the smaller, so that both compare equal.
    flip_quotient, flipped = _divide(-num + den - 1, den)
    if _preference(flipped) < _preference(num):
        return quotient - flip_quotient - _floor(flipped, den)
    return quotient + _floor(num, den)


def _floor(num: Dim, den: Dim) -> Dim:
    return of_atom(Floor(num, den)) if num.terms else Dim(())


def ceildiv(a: Number | Dim, b: Number | Dim) -> Dim:
    """a / b rounded up. Raises MOEC107 when b is a constant that is not positive."""
    return -floordiv(-as_dim(a), b)


def _preference(size: Dim) -> Key:
    # Few positive terms before many or negative ones: floordiv(T, 4) rather than -floordiv(3 - T, 4).
    return tuple((c < 0, abs(c), monomial_key(m)) for m, c in size.terms)


def _check_divisor(den: Dim) -> None:
    value = den.terms[0][1] if den.terms else Fraction(0)
    if all(monomial == () for monomial, _ in den.terms) and value <= 0:
        raise MoecError("MOEC107", f"size divided by {value}", hint="divide by a positive size")


def _scaled_whole(num: Dim, den: Dim) -> tuple[Dim, Dim]:
    """Both times the least number that makes all coefficients whole."""
    scale = math.lcm(*(c.denominator for size in (num, den) for _, c in size.terms))
    return num * scale, den * scale


def _divide(num: Dim, den: Dim) -> tuple[Dim, Dim]:
    """num = quotient * den + rest, where no term of the rest has a whole multiple of den's first term to give."""
    lead, lead_coefficient = den.terms[0]
    quotient, rest = Dim(()), num
    while True:
        step = next((s for m, c in rest.terms if (s := _step(m, c, lead, lead_coefficient)) is not None), None)
        if step is None:
            return quotient, rest
        quotient, rest = quotient + step, rest - step * den


def _step(monomial: Monomial, coefficient: Fraction, lead: Monomial, lead_coefficient: Fraction) -> Dim | None:
    whole = coefficient // lead_coefficient
    powers = dict(monomial)
    if not whole or any(powers.get(atom, 0) < power for atom, power in lead):
        return None
    for atom, power in lead:
        powers[atom] -= power
    return from_terms({tuple((atom, power) for atom, power in powers.items() if power): Fraction(whole)})


def _reduced(num: Dim, den: Dim) -> tuple[Dim, Dim]:
    """Cancel what num and den share: floor((g*m + r) / (g*d)) = floor((m + floor(r/g)) / d)."""
    rest = dict(num.terms).get((), Fraction(0))
    size = num - from_terms({(): rest})
    scale = content([size, den])
    return size * (1 / scale) + math.floor(rest / scale), den * (1 / scale)


def _merged(num: Dim, den: Dim) -> Dim | None:
    """floor((floor(x/a) + y) / b) = floor((x + a*y) / (a*b)) for constants a and b and any y, or None."""
    if den.constant is None:
        return None
    for monomial, coefficient in num.terms:
        atom = only_atom(monomial)
        if not isinstance(atom, Floor) or atom.den.constant is None:
            continue
        rest, a = num - from_terms({monomial: coefficient}), atom.den
        if coefficient == 1:
            return floordiv(atom.num + a * rest, a * den)
        if coefficient == -1:  # -floor(x/a) = floor((-x + a - 1)/a)
            return floordiv(a - 1 - atom.num + a * rest, a * den)
        if coefficient == den.constant - 1:  # the same after taking out one whole floor(x/a)
            return of_atom(atom) + floordiv(a - 1 - atom.num + a * rest, a * den)
    return None
