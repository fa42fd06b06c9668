"""Ops whose results depend on weights only; a back end evaluates them once, when it builds.

E experts, N outputs, C inputs.
"""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from moec.ir.core import Op, Value, op, require
from moec.ir.rules import require_float, require_min_rank, require_same_dtype
from moec.ir.types import Dim, Tensor


@op("weight")
@dataclass(frozen=True)
class Weight(Op):
    """-> the weight called `ref`, of the declared type; the IR never holds its elements.

    Matrices of experts are [E, N, C] (N outputs, C inputs), their biases [E, N]; a dense layer has [N, C] and [N].
    What `ref` names, and how its elements lie in the user's parameters, is the weight store's business.
    """

    of_weights: ClassVar[bool] = True
    _: KW_ONLY
    ref: str
    type: Tensor

    def infer(self) -> tuple[Tensor, ...]:
        require(self.ref != "", "MOEC102", "ref must not be empty")
        return (self.type,)


@op("constant")
@dataclass(frozen=True)
class Constant(Op):
    """-> a tensor of the declared type filled with `value` (whole for integers, 0 or 1 for bool)."""

    _: KW_ONLY
    value: float
    type: Tensor

    def infer(self) -> tuple[Tensor, ...]:
        whole = self.type.is_float or float(self.value).is_integer()
        require(whole, "MOEC102", f"value={self.value} must be whole for {self.type}")
        fits = self.type.dtype != "bool" or self.value in (0, 1)
        require(fits, "MOEC102", f"value={self.value} must be 0 or 1 for {self.type}")
        return (self.type,)


@op("concat_weights")
@dataclass(frozen=True)
class ConcatWeights(Op):
    """weights that agree in all sizes but one -> the weights one after the other along `axis`.

    Gate and up matrices [E, F, D] along axis 1 become one [E, 2F, D].
    """

    of_weights: ClassVar[bool] = True
    weights: tuple[Value, ...]
    _: KW_ONLY
    axis: int

    def infer(self) -> tuple[Tensor, ...]:
        require(len(self.weights) >= 1, "MOEC106", "takes at least one weight")
        first = self.weights[0]
        rank = first.type.rank
        require(0 <= self.axis < rank, "MOEC102", f"axis={self.axis} must be in 0..{rank - 1} for {first.type}")
        total = Dim.of(0)
        for other in self.weights:
            require_same_dtype(str(other), other, str(first), first)
            agree = _without(other.type.shape, self.axis) == _without(first.type.shape, self.axis)
            message = (
                f"{first} is {first.type} but {other} is {other.type}: they must agree in all but axis {self.axis}"
            )
            require(agree, "MOEC105", message)
            total = total + other.type.shape[self.axis]
        return (Tensor(first.type.dtype, (*first.type.shape[: self.axis], total, *first.type.shape[self.axis + 1 :])),)


def _without(shape: tuple[Dim, ...], axis: int) -> tuple[Dim, ...] | None:
    return (*shape[:axis], *shape[axis + 1 :]) if axis < len(shape) else None


@op("select_experts")
@dataclass(frozen=True)
class SelectExperts(Op):
    """w[E, ...] -> [len(experts), ...]: result i is w[experts[i]].

    Puts the experts of one device beside each other (see `exchange`); an expert may occur more than once (a replica)
    or not at all.
    """

    of_weights: ClassVar[bool] = True
    w: Value
    _: KW_ONLY
    experts: tuple[int, ...]

    def infer(self) -> tuple[Tensor, ...]:
        require_min_rank("w", self.w, 1)
        require(len(self.experts) >= 1, "MOEC102", "experts must name at least one expert")
        num_experts = self.w.type.shape[0].constant
        for expert in self.experts:
            inside = expert >= 0 and (num_experts is None or expert < num_experts)
            last = "E-1" if num_experts is None else num_experts - 1
            require(inside, "MOEC102", f"expert {expert} must be in 0..{last}")
        return (Tensor(self.w.type.dtype, (Dim.of(len(self.experts)), *self.w.type.shape[1:])),)


@op("quantize_weight")
@dataclass(frozen=True)
class QuantizeWeight(Op):
    """w[..., N, C] -> q i8[..., N, C], scale f32[..., N]: symmetric, one scale for each output of each expert.

    In fp32: scale = max |w| over C, divided by 127, or 1 where all of w is 0; q = w / scale rounded half to even,
    within -127..127. q * scale is the weight that ops with a `scale` operand use.
    """

    of_weights: ClassVar[bool] = True
    w: Value

    def infer(self) -> tuple[Tensor, ...]:
        require_min_rank("w", self.w, 2)
        require_float("w", self.w)
        return self.w.type.with_dtype("i8"), Tensor("f32", self.w.type.shape[:-1])
