"""Integers that differ between runs of different shapes must be size expressions of the input; anything else refuses.

A recorded integer that takes the value v_i in run i is accepted as a constant, or as `scale * product of input sizes`,
or as `product of input sizes + shift`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Size:
    """`scale * product(dims[i] for i in factors) + shift` over the input's sizes."""

    factors: tuple[int, ...]
    scale: Fraction
    shift: int

    def __call__(self, dims: Sequence[int]) -> int:
        # Rounded towards zero, in integers: this is part of each call, and fractions are slow.
        top = self.scale.numerator * math.prod([dims[i] for i in self.factors])
        whole = abs(top) // self.scale.denominator
        return (whole if top >= 0 else -whole) + self.shift


def solve(values: Sequence[int], shapes: Sequence[Sequence[int]]) -> int | Size | None:
    """The simplest expression of the shapes' sizes with the given values, one per run; None if there is none."""
    if len(set(values)) == 1:
        return values[0]
    varying = [i for i in range(len(shapes[0])) if len({shape[i] for shape in shapes}) > 1]
    choices = [c for n in range(1, len(varying) + 1) for c in itertools.combinations(varying, n)]
    for shifted in (False, True):
        for factors in choices:
            found = _fit(values, [math.prod(shape[i] for i in factors) for shape in shapes], factors, shifted)
            if found is not None:
                return found
    return None


def _fit(values: Sequence[int], products: Sequence[int], factors: tuple[int, ...], shifted: bool) -> Size | None:
    if not shifted:
        scale, shift = Fraction(values[0], products[0]), 0
    else:
        pairs = [(v, p) for v, p in zip(values, products, strict=True) if p != products[0]]
        if not pairs:
            return None
        scale = Fraction(pairs[0][0] - values[0], pairs[0][1] - products[0])
        if scale != 1:
            # Two runs fix any line; only an offset from a size itself (S - 1) is a size expression people write.
            return None
        shift = values[0] - products[0]
    if scale == 0 or any(scale * p + shift != v for v, p in zip(values, products, strict=True)):
        return None
    return Size(factors, scale, shift)
