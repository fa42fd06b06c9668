"""The capacity of an expert as a size: from how many slots it kept when all tokens chose it, to an expression of T.

T tokens, C capacity. A reading is one way in which code makes a whole number of q * T: rounded up or down, to a
multiple, plus one, at least some number. Of each reading the interval of q that explains every count is known exactly;
the simplest fraction in it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from moec.ir import Dim

MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128)
# A fraction with more in it than this is no factor that anybody wrote.
_MOST_DIGITS = 1000


@dataclass
class _Interval:
    """Numbers above `low` and below `high`, or equal to them where they are closed."""

    low: Fraction = Fraction(0)
    high: Fraction = Fraction(1 << 20)
    low_closed: bool = False
    high_closed: bool = True

    def above(self, value: Fraction, *, closed: bool) -> None:
        if value > self.low or (value == self.low and not closed):
            self.low, self.low_closed = value, closed

    def below(self, value: Fraction, *, closed: bool) -> None:
        if value < self.high or (value == self.high and not closed):
            self.high, self.high_closed = value, closed

    def holds(self, value: Fraction) -> bool:
        over = value > self.low or (self.low_closed and value == self.low)
        return over and (value < self.high or (self.high_closed and value == self.high))


@dataclass(frozen=True)
class _Reading:
    """`multiple` * round(q * T / multiple) + `more`; with `twice` q * T is rounded down before that."""

    up: bool
    multiple: int = 1
    more: int = 0
    twice: bool = False

    def equals(self, tokens: int, count: int, q: _Interval) -> bool:
        """Narrow q to where the size at `tokens` is `count`; False where it cannot be."""
        if (count - self.more) % self.multiple:
            return False
        self.at_least(tokens, count, q)
        self.at_most(tokens, count, q)
        return True

    def at_least(self, tokens: int, count: int, q: _Interval) -> None:
        whole = self.multiple * -(-(count - self.more) // self.multiple)
        if self.twice:
            q.above(Fraction(whole - self.multiple + 1, tokens), closed=True)
        elif self.up:
            q.above(Fraction(whole - self.multiple, tokens), closed=False)
        else:
            q.above(Fraction(whole, tokens), closed=True)

    def at_most(self, tokens: int, count: int, q: _Interval) -> None:
        whole = self.multiple * ((count - self.more) // self.multiple)
        if self.twice:
            q.below(Fraction(whole + 1, tokens), closed=False)
        elif self.up:
            q.below(Fraction(whole, tokens), closed=True)
        else:
            q.below(Fraction(whole + self.multiple, tokens), closed=False)

    def value(self, tokens: int, q: Fraction) -> int:
        exact = q * tokens if not self.twice else Fraction(math.floor(q * tokens))
        part = exact / self.multiple
        return self.multiple * (math.ceil(part) if self.up else math.floor(part)) + self.more

    def size(self, letter: Dim, q: Fraction) -> Dim:
        slots = letter * q.numerator
        if self.twice:
            return slots.floordiv(q.denominator).ceildiv(self.multiple) * self.multiple + self.more
        divide = slots.ceildiv if self.up else slots.floordiv
        return divide(q.denominator * self.multiple) * self.multiple + self.more


@dataclass(frozen=True)
class Capacity:
    """A reading with its q, at least `least`; `least` alone where there is no reading."""

    reading: _Reading | None
    q: Fraction
    least: int

    def at(self, tokens: int) -> int:
        """The capacity for that many tokens."""
        return max(self.least, 0 if self.reading is None else self.reading.value(tokens, self.q))

    def size(self, letter: str) -> Dim:
        """As an expression of the IR."""
        if self.reading is None:
            return Dim.of(self.least)
        size = self.reading.size(Dim.of(letter), self.q)
        return size.max(self.least) if self.least else size

    def text(self, letter: str) -> str:
        """For people: ceil(5/16 T), at least 4."""
        if self.reading is None:
            return str(self.least)
        q, reading = self.q, self.reading
        slots = letter if q == 1 else f"{q} {letter}"
        inner = f"floor({slots})" if reading.twice else slots
        word = "ceil" if reading.up else "floor"
        rounded = inner if q.denominator == 1 and reading.multiple == 1 else f"{word}({inner})"
        if reading.multiple > 1:
            rounded = f"{reading.multiple} {word}({inner} / {reading.multiple})"
        more = f" + {reading.more}" if reading.more else ""
        return f"{rounded}{more}" + (f", but at least {self.least}," if self.least else "")

    @property
    def delicate(self) -> int | None:
        """A number of tokens at whose multiples q * T is whole, where floats that are no fractions of two may round."""
        bottom = self.q.denominator
        return bottom if self.reading is not None and bottom & (bottom - 1) else None


def _readings() -> Iterator[_Reading]:
    for multiple in MULTIPLES:
        yield _Reading(True, multiple)
        yield _Reading(False, multiple)
        if multiple > 1:
            yield _Reading(True, multiple, twice=True)
        else:
            yield _Reading(False, more=1)


def capacities(kept: Mapping[int, int], experts: int) -> list[Capacity]:
    """What explains how many of T slots for one expert were kept, for each T that was tried; simplest first."""
    full = [count for tokens, count in kept.items() if count < tokens]
    if not full:
        return []
    found = [((0, 0), Capacity(None, Fraction(0), min(full)))]
    for place, reading in enumerate(_readings()):
        for least in (0, min(full)):
            q = _explaining(reading, least, kept)
            fraction = None if q is None else _simplest(q, experts)
            if fraction is not None:
                factor = fraction * experts
                cost = factor.numerator + factor.denominator + bool(least)
                found.append(((cost, place), Capacity(reading, fraction, least)))
    fitting = [one for one in found if all(min(one[1].at(t), t) == count for t, count in kept.items())]
    return [capacity for _, capacity in sorted(fitting, key=lambda one: one[0])]


def told_apart_at(found: Sequence[Capacity], known: Container[int], most: int) -> int | None:
    """A number of tokens, not tried and at most `most`, at which the first capacity differs from another one."""
    for other in found[1:]:
        for tokens in range(1, most + 1):
            if tokens not in known and min(found[0].at(tokens), tokens) != min(other.at(tokens), tokens):
                return tokens
    return None


def _explaining(reading: _Reading, least: int, kept: Mapping[int, int]) -> _Interval | None:
    """All q with which the reading, at least `least`, explains the counts."""
    q = _Interval()
    for tokens, count in kept.items():
        if count == tokens:
            if least < tokens:
                reading.at_least(tokens, tokens, q)
        elif least and count == least:
            reading.at_most(tokens, count, q)
        elif count < least or not reading.equals(tokens, count, q):
            return None
    return q


def _simplest(q: _Interval, experts: int) -> Fraction | None:
    """The q in the interval whose multiple by the number of experts has the least denominator, then numerator."""
    for bottom in range(1, _MOST_DIGITS):
        step = Fraction(1, bottom * experts)
        top = math.floor(q.low / step)
        for n in (top, top + 1):
            if n > 0 and q.holds(n * step):
                return n * step
        if q.low > q.high:
            return None
    return None
