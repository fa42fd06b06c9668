"""Elementwise ops: shared experts, shared gates, residuals, and activations written out."""

from dataclasses import KW_ONLY, dataclass

from moec.ir.core import Op, Value, op, require
from moec.ir.formula import parse_formula
from moec.ir.rules import require_float, require_same_dtype, require_shape
from moec.ir.types import Dim, Tensor


def _broadcast(a: Value, b: Value) -> Tensor:
    require_same_dtype("a", a, "b", b)
    require(a.type.dtype != "bool", "MOEC104", f"a must hold numbers, found {a.type}")
    rank = max(a.type.rank, b.type.rank)
    one = Dim.of(1)
    shapes = [(one,) * (rank - value.type.rank) + value.type.shape for value in (a, b)]
    sizes: list[Dim] = []
    for left, right in zip(*shapes, strict=True):
        fits = left == right or one in (left, right)
        require(fits, "MOEC105", f"a is {a.type} but b is {b.type}: sizes must be equal or 1, counted from the right")
        sizes.append(right if left == one else left)
    return Tensor(a.type.dtype, tuple(sizes))


@op("add")
@dataclass(frozen=True)
class Add(Op):
    """a, b -> a + b; sizes are equal or 1, counted from the right."""

    a: Value
    b: Value

    def infer(self) -> tuple[Tensor, ...]:
        return (_broadcast(self.a, self.b),)


@op("mul")
@dataclass(frozen=True)
class Mul(Op):
    """a, b -> a * b; sizes are equal or 1, counted from the right. A shared gate is [T, 1] times [T, D]."""

    a: Value
    b: Value

    def infer(self) -> tuple[Tensor, ...]:
        return (_broadcast(self.a, self.b),)


@op("pointwise")
@dataclass(frozen=True)
class Pointwise(Op):
    """a[...], b[...]? -> formula(a, b), elementwise, in a's element type: an activation written out.

    For what `act` and `glu` have no name for. `formula` has + - * /, numbers, a, b, the functions of `act` but
    identity, exp, square, abs, neg, min and max: `10 * tanh(a / 10) * sigmoid(a) * b`. Evaluated in at
    least fp32 and rounded once at the end.
    """

    a: Value
    b: Value | None = None
    _: KW_ONLY
    formula: str

    def infer(self) -> tuple[Tensor, ...]:
        require_float("a", self.a)
        read = parse_formula(self.formula).operands
        given = {"a"} if self.b is None else {"a", "b"}
        names = " and ".join(sorted(given))
        require(read == given, "MOEC106", f'formula="{self.formula}" must read {names}, and nothing else')
        if self.b is not None:
            require_same_dtype("b", self.b, "a", self.a)
            require_shape("b", self.b, self.a.type.shape, f"like a {self.a.type}")
        return (self.a.type,)
