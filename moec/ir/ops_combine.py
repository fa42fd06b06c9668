"""From the experts' rows back to tokens, and routing weights on the way.

T tokens, K experts per token, E experts, D model width, R rows, C capacity.
"""

from dataclasses import KW_ONLY, dataclass

from moec.ir.core import Op, Value, op, require
from moec.ir.ops_group import SIDES
from moec.ir.rules import (
    require_at_least,
    require_choice,
    require_float,
    require_index,
    require_rank,
    require_shape,
    require_size,
)
from moec.ir.types import Dim, Tensor

KEPT_NORMALIZATIONS = ("none", "sum", "clamped_sum")


def _check_rows(rows: Value, order: Value, weights: Value) -> None:
    require_rank("rows", rows, 2)
    require_float("rows", rows)
    require_index("order", order)
    require_rank("order", order, 1)
    require_rank("weights", weights, 2)
    require_float("weights", weights)
    num_rows = rows.type.shape[0]
    require_size("the size of order", order.type.shape[0], num_rows, f"like the rows of {rows.type}")
    slots = weights.type.shape[0] * weights.type.shape[1]
    require_size(f"the number of weights in {weights.type}", slots, num_rows, f"like the rows of {rows.type}")


@op("combine")
@dataclass(frozen=True)
class Combine(Op):
    """rows[R, D], order[R], weights[T, K] -> [T, D]: each token's weighted sum of its experts' rows.

    by="token": out[t] = sum over j = 0..K-1, in this order, of weights[t, j] * rows[r] with order[r] = t*K + j; a slot
    that is not in order (dropped) adds nothing.
    by="expert" (expert choice): order holds tokens, weights is [E, C] and belongs to rows in their order; out[t] = sum
    over the r with order[r] = t, ascending, of weights.flat[r] * rows[r]; `tokens` is T, which no operand shows.

    Either way: products and sums in fp32 (f64 if rows or weights hold it), one rounding to rows' element type at the
    end; rows whose order is -1 add nothing, whatever they hold; a token without rows gets zeros.
    """

    rows: Value
    order: Value
    weights: Value
    _: KW_ONLY
    by: str = "token"
    tokens: Dim | None = None

    def infer(self) -> tuple[Tensor, ...]:
        require_choice("by", self.by, SIDES)
        _check_rows(self.rows, self.order, self.weights)
        paired = (self.tokens is not None) == (self.by == "expert")
        require(paired, "MOEC106", 'tokens, the number of tokens, goes with by="expert" and only with it')
        num_tokens = self.weights.type.shape[0] if self.tokens is None else self.tokens
        return (Tensor(self.rows.type.dtype, (num_tokens, self.rows.type.shape[1])),)


@op("scale_rows")
@dataclass(frozen=True)
class ScaleRows(Op):
    """rows[R, D], order[R], weights[T, K] -> [R, D]: each row times its slot's weight.

    For weights applied to the expert's input.

    by="token": out[r] = rows[r] * weights.flat[order[r]]. by="expert": weights is [E, C] and out[r] = rows[r] *
    weights.flat[r]. Zeros where order[r] is -1. The product is taken in rows' element type, after the weight was
    rounded to it: that is what models do here.
    """

    rows: Value
    order: Value
    weights: Value
    _: KW_ONLY
    by: str = "token"

    def infer(self) -> tuple[Tensor, ...]:
        require_choice("by", self.by, SIDES)
        _check_rows(self.rows, self.order, self.weights)
        return (self.rows.type,)


@op("kept_weights")
@dataclass(frozen=True)
class KeptWeights(Op):
    """weights[T, K], order[R] -> [T, K]: zero for slots that are not in order, the others normalized among themselves.

    For routers that normalize after a capacity has dropped slots, so that what is left of a token sums to one. With
    w' the weights of kept slots and zeros elsewhere: "none" w'; "sum" w' / (sum w' + eps); "clamped_sum"
    w' / max(sum w', eps), each sum over a token's K slots, in fp32 (f64 if weights hold it), rounded once. A token of
    which nothing is kept has zeros, but with "sum" and eps=0, where it has 0/0.
    """

    weights: Value
    order: Value
    _: KW_ONLY
    normalize: str = "none"
    eps: float = 0.0

    def infer(self) -> tuple[Tensor, ...]:
        require_rank("weights", self.weights, 2)
        require_float("weights", self.weights)
        require_index("order", self.order)
        require_rank("order", self.order, 1)
        slots = self.weights.type.shape[0] * self.weights.type.shape[1]
        require_size("the size of order", self.order.type.shape[0], slots, f"like the slots of {self.weights.type}")
        require_choice("normalize", self.normalize, KEPT_NORMALIZATIONS)
        require(self.eps >= 0, "MOEC102", f"eps={self.eps} must be at least 0")
        sums = self.normalize != "none" or self.eps == 0
        require(sums, "MOEC106", f'eps={self.eps} goes with normalize="sum" or "clamped_sum"')
        return (self.weights.type,)


@op("identity_rows")
@dataclass(frozen=True)
class IdentityRows(Op):
    """x[T, D], ids[T, K], weights[T, K] -> [T, D]: what identity experts add, x[t] * sum of their weights.

    The experts `first`..`first+count-1` return their input. out[t] = x[t] * (sum over j = 0..K-1, in this order, of
    weights[t, j] where ids[t, j] is one of them), in fp32 (f64 if x or weights hold it), rounded once. The other
    experts are an ordinary group with experts=first, which leaves these ids out; `add` joins the two.
    """

    x: Value
    ids: Value
    weights: Value
    _: KW_ONLY
    first: int
    count: int

    def infer(self) -> tuple[Tensor, ...]:
        require_rank("x", self.x, 2)
        require_float("x", self.x)
        require_rank("ids", self.ids, 2)
        require_index("ids", self.ids)
        require_float("weights", self.weights)
        require_at_least("first", self.first, 0)
        require_at_least("count", self.count, 1)
        num_tokens = self.x.type.shape[0]
        require_size(f"the tokens of ids {self.ids.type}", self.ids.type.shape[0], num_tokens, f"like x {self.x.type}")
        require_shape("weights", self.weights, self.ids.type.shape, f"like ids {self.ids.type}")
        return (self.x.type,)
