"""Elementwise ops around the experts: shared experts, shared gates, residuals."""

from dataclasses import dataclass

from moec.ir.core import Op, Value, op, require
from moec.ir.rules import require_same_dtype
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
