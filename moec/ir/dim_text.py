"""Text of sizes: `2T + 3`, `5/4*T*K`, `ceildiv(5T, 32)`, `min(T, C) - 1`."""

import re
from collections.abc import Callable
from fractions import Fraction

from moec.ir.dim import Dim, Floor, Min, Monomial, from_terms, letter, only_atom
from moec.ir.dim_floor import ceildiv, floordiv
from moec.ir.dim_min import maximum, minimum
from moec.ir.lexer import Cursor, Token

_LETTER = re.compile(r"[A-Z][A-Za-z0-9]*")
_MAX_NESTING = 64  # deeper text is a mistake, and Python's own limit would be a worse message
_MAX_DIGITS = 18  # every size fits 64 bits


def is_letter(name: str) -> bool:
    """Whether the name can stand for a size: a capital, then letters and digits."""
    return _LETTER.fullmatch(name) is not None


def parse_dim(text: str) -> Dim:
    """Read one size. Raises MOEC107 with the column."""
    cursor = Cursor(text, code="MOEC107")
    size = read_dim(cursor)
    if cursor.token.kind != "end":
        cursor.fail(f"expected an operator or the end of the size, found {cursor.token}")
    return size


def read_dim(cursor: Cursor, depth: int = 0) -> Dim:
    """Read a size from a cursor over a longer text."""
    if depth > _MAX_NESTING:
        cursor.fail(f"size nested more than {_MAX_NESTING} deep", code="MOEC107")
    size = _read_term(cursor, depth)
    while cursor.at("+", "-"):
        sign = cursor.take().text
        term = _read_term(cursor, depth)
        size = size + term if sign == "+" else size - term
    return size


def _read_term(cursor: Cursor, depth: int) -> Dim:
    size = _read_factor(cursor, depth)
    while cursor.at("*", "/"):
        operator = cursor.take()
        if operator.text == "*":
            size = size * _read_factor(cursor, depth)
            continue
        token = cursor.expect_kind("number", "a number after '/'")
        number = whole_number(cursor, token)
        if number == 0:
            cursor.fail("a size cannot be divided by 0", token, code="MOEC107")
        size = size * Fraction(1, number)
    return size


def _read_factor(cursor: Cursor, depth: int) -> Dim:
    sign = 1
    while cursor.accept("-"):
        sign = -sign
    token = cursor.token
    if token.kind == "number":
        cursor.take()
        size = Dim.of(whole_number(cursor, token))
        # A letter right after its number: 2T.
        return sign * (size * _read_name(cursor, depth) if cursor.token.kind == "name" else size)
    if token.kind == "name":
        return sign * _read_name(cursor, depth)
    if not cursor.accept("("):
        cursor.fail(f"expected a size, found {token}", code="MOEC107")
    size = read_dim(cursor, depth + 1)
    cursor.expect(")", "a size in parentheses")
    return sign * size


def whole_number(cursor: Cursor, token: Token) -> int:
    """The token as a whole number of at most 18 digits."""
    if not token.text.isdigit() or len(token.text) > _MAX_DIGITS:
        cursor.fail(f"expected a whole number of at most {_MAX_DIGITS} digits, found {token}", token, code="MOEC107")
    return int(token.text)


def _read_name(cursor: Cursor, depth: int) -> Dim:
    name = cursor.take()
    if name.text not in _FUNCTIONS:
        if not is_letter(name.text):
            known = _FUNCTIONS
            cursor.fail(f'"{name.text}" is neither a letter nor a function of sizes', name, code="MOEC107", known=known)
        return letter(name.text)
    cursor.expect("(", name.text)
    args = [read_dim(cursor, depth + 1)]
    while cursor.accept(","):
        args.append(read_dim(cursor, depth + 1))
    cursor.expect(")", f"the sizes of {name.text}")
    if name.text in ("floordiv", "ceildiv") and len(args) != 2:
        cursor.fail(f"{name.text} takes 2 sizes, found {len(args)}", name, code="MOEC107")
    with cursor.at_token(name):
        return _FUNCTIONS[name.text](*args)


_FUNCTIONS: dict[str, Callable[..., Dim]] = {"floordiv": floordiv, "ceildiv": ceildiv, "min": minimum, "max": maximum}


def print_dim(size: Dim) -> str:
    """The shortest text this module knows for the size; reading it gives the same size."""
    if len(size.terms) == 1:  # a number or a letter, as most sizes are
        ((monomial, coefficient),) = size.terms
        if not monomial:
            return str(coefficient)
        if coefficient == 1 and len(monomial) == 1 and monomial[0][1] == 1 and isinstance(monomial[0][0], str):
            return monomial[0][0]
    rest = size
    special: list[tuple[Fraction, str]] = []
    for monomial, coefficient in size.terms:
        shown = _as_max(monomial, coefficient) or _as_ceildiv(monomial, coefficient)
        if shown is not None:
            text, factor, correction = shown
            special.append((factor, text))
            rest = rest - from_terms({monomial: coefficient}) + correction
    pieces = [(c, "*".join(_print_atom(atom) for atom, n in m for _ in range(n))) for m, c in rest.terms]
    symbolic = special + [piece for piece in pieces if piece[1]]
    pieces = sorted(symbolic, key=lambda piece: piece[0] < 0) + [piece for piece in pieces if not piece[1]]
    if not pieces:
        return "0"
    if pieces[0][0] < 0:  # 3 - T rather than -T + 3
        pieces = sorted(pieces, key=lambda piece: piece[0] < 0)
    text = "".join(f" {'-' if c < 0 else '+'} {_print_piece(abs(c), piece)}" for c, piece in pieces)
    return text[3:] if text.startswith(" + ") else f"-{text[3:]}"


def _print_piece(coefficient: Fraction, piece: str) -> str:
    if not piece:
        return str(coefficient)
    if coefficient == 1:
        return piece
    juxtaposed = coefficient.denominator == 1 and piece[0].isupper()
    return f"{coefficient}{'' if juxtaposed else '*'}{piece}"


def _print_atom(atom: str | Floor | Min) -> str:
    if isinstance(atom, str):
        return atom
    if isinstance(atom, Min):
        return f"min({', '.join(map(str, atom.args))})"
    rest = dict(atom.num.terms).get((), Fraction(0))
    if atom.den.constant is not None and rest == atom.den.constant - 1:
        return f"ceildiv({atom.num - rest}, {atom.den})"
    return f"floordiv({atom.num}, {atom.den})"


def _as_max(monomial: Monomial, coefficient: Fraction) -> tuple[str, Fraction, Dim] | None:
    """-min(a, b) as max(top - a, top - b) - top, where top leaves no negative terms: (text, factor, what to add)."""
    atom = only_atom(monomial)
    if coefficient > 0 or not isinstance(atom, Min):
        return None
    args = atom.args
    monomials = {m for arg in args for m, _ in arg.terms}
    top = from_terms({m: max(dict(arg.terms).get(m, Fraction(0)) for arg in args) for m in monomials})
    text = f"max({', '.join(sorted(str(top - arg) for arg in args))})"
    return text, -coefficient, coefficient * top


def _as_ceildiv(monomial: Monomial, coefficient: Fraction) -> tuple[str, Fraction, Dim] | None:
    """A rounding down as a rounding up where that reads better: (text, factor, what to add)."""
    atom = only_atom(monomial)
    if not isinstance(atom, Floor):
        return None
    num, den = atom.num, atom.den
    if den.constant == 2 and coefficient < 0:  # halves: n - floor(n/2) is ceil(n/2)
        return f"ceildiv({num}, 2)", -coefficient, coefficient * num
    if den.constant is None and dict(num.terms).get((), Fraction(0)) < 0:  # floor((n - 1)/d) is ceil(n/d) - 1
        return f"ceildiv({num + 1}, {den})", coefficient, Dim.of(-coefficient)
    return None
