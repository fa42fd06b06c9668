"""Formulas of one number or two, as `pointwise` has them: `10 * tanh(a / 10) * sigmoid(a) * b`."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from moec.errors import MoecError, did_you_mean
from moec.ir.ops_activation import FUNCTIONS

# Functions of one number; those of `act` mean what they mean there.
UNARY = (*(fn for fn in FUNCTIONS if fn != "identity"), "exp", "square", "abs", "neg")
BINARY = ("min", "max")
_BINARY: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2}
_DEEPEST = 32

T = TypeVar("T")


@dataclass(frozen=True)
class Formula:
    """`fn` of its arguments: one of UNARY, of + - * /, BINARY; without arguments "a", "b", "number"."""

    fn: str
    args: tuple[Formula, ...] = ()
    value: float = 0.0

    def __str__(self) -> str:
        if self.fn in ("a", "b"):
            return self.fn
        if self.fn == "number":
            return _number(self.value)
        if self.fn in _BINDING:
            left, right = self.args
            return f"{_within(left, self.fn, False)} {self.fn} {_within(right, self.fn, True)}"
        return f"{self.fn}({', '.join(map(str, self.args))})"

    @property
    def operands(self) -> frozenset[str]:
        """Which of a and b it reads."""
        own = {self.fn} if self.fn in ("a", "b") else set()
        return frozenset(own.union(*(arg.operands for arg in self.args)))


def fold(formula: Formula, leaf: Callable[[Formula], T], apply: Callable[[str, Sequence[T]], T]) -> T:
    """The formula's value, from the values of its leaves and of its functions."""
    if not formula.args:
        return leaf(formula)
    return apply(formula.fn, [fold(arg, leaf, apply) for arg in formula.args])


def number(value: float) -> Formula:
    return Formula("number", value=float(value))


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e6 else repr(value)


def _within(arg: Formula, fn: str, right: bool) -> str:
    binding = _BINDING.get(arg.fn, 3)
    if arg.fn == "number" and arg.value < 0:
        binding = 0
    loose = binding < _BINDING[fn] or (right and binding == _BINDING[fn])
    return f"({arg})" if loose else str(arg)


def parse_formula(text: str) -> Formula:
    """The formula that the text says. Raises MOEC102."""
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _wrong(text, str(error).partition(" (")[0] or "not understood") from None
    return _parse(tree, text, 0)


def _parse(node: ast.expr, text: str, depth: int) -> Formula:
    if depth > _DEEPEST:
        raise _wrong(text, f"more than {_DEEPEST} levels")
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return number(node.value)
    if isinstance(node, ast.Name) and node.id in ("a", "b"):
        return Formula(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _parse(node.operand, text, depth + 1)
        return number(-inner.value) if inner.fn == "number" else Formula("neg", (inner,))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return Formula(_BINARY[type(node.op)], tuple(_parse(n, text, depth + 1) for n in (node.left, node.right)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _call(node.func.id, tuple(_parse(arg, text, depth + 1) for arg in node.args), text)
    raise _wrong(text, f"{ast.unparse(node)!r} is none of a, b, a number, + - * / and a function")


def _call(fn: str, args: tuple[Formula, ...], text: str) -> Formula:
    if fn not in (*UNARY, *BINARY):
        raise _wrong(text, f"{fn} is no function here", did_you_mean(fn, (*UNARY, *BINARY)))
    wanted = 1 if fn in UNARY else 2
    if len(args) != wanted:
        raise _wrong(text, f"{fn} takes {wanted}, found {len(args)}")
    return Formula(fn, args)


def _wrong(text: str, why: str, hint: str | None = None) -> MoecError:
    return MoecError("MOEC102", f'formula="{text}": {why}', hint=hint)
