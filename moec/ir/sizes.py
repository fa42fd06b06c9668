"""The sizes of a call: what the letters are, given the shapes of the tensors that come in."""

from collections.abc import Sequence
from fractions import Fraction

from moec.errors import MoecError
from moec.ir.core import Value
from moec.ir.dim import Dim


def bind_sizes(values: Sequence[Value], shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The value of each letter when tensors of these shapes are passed for the values (inputs, weights).

    A letter is read off where it stands alone (`T`) or alone with numbers (`2T + 1`); every other size is then checked.
    Raises MOEC109 when a shape does not fit, or when a letter cannot be read off.
    """
    assert len(values) == len(shapes), "one shape for each value"
    pairs: list[tuple[Value, Dim, int]] = []
    for value, shape in zip(values, shapes, strict=True):
        if len(shape) != value.type.rank:
            raise MoecError("MOEC109", f"{value} must be {value.type}, found shape {list(shape)}")
        pairs += [(value, size, found) for size, found in zip(value.type.shape, shape, strict=True)]
    sizes: dict[str, int] = {}
    # Each round can make another size depend on one letter only.
    while new := next((bound for pair in pairs if (bound := _solve(*pair, sizes))), None):
        sizes |= new
    for value, size, found in pairs:
        missing = sorted(size.letters - set(sizes))
        if missing:
            raise MoecError("MOEC109", f"{value}: the size of {missing[0]} does not follow from {size} = {found}")
        if size.evaluate(sizes) != found:
            raise MoecError("MOEC109", f"{value} is {value.type}: {_expected(size, sizes)}, found {found}")
    return sizes


def _expected(size: Dim, sizes: dict[str, int]) -> str:
    if size.constant is not None:
        return f"expected {size}"
    if str(size) in sizes:
        return f"{size} is {sizes[str(size)]}"
    at = ", ".join(f"{letter}={sizes[letter]}" for letter in sorted(size.letters))
    return f"{size} is {size.evaluate(sizes)} with {at}"


def _solve(value: Value, size: Dim, found: int, sizes: dict[str, int]) -> dict[str, int] | None:
    """The letter of a size a*L + b that has only one letter left, if there is one."""
    (letter, *others) = sorted(size.letters - set(sizes)) or [""]
    if not letter or others:
        return None
    terms = dict(size.substitute(sizes).terms)
    rest = terms.pop((), Fraction(0))
    ((monomial, factor),) = terms.items() if len(terms) == 1 else [((), Fraction(1))]
    if monomial != ((letter, 1),):
        return None
    answer = (found - rest) / factor
    if answer.denominator != 1 or answer < 0:
        raise MoecError("MOEC109", f"{value} is {value.type}: no {letter} makes {size} = {found}")
    return {letter: int(answer)}
