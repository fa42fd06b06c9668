"""Dense dispatch and combine: every place of every expert is a weighted mix of tokens (Soft MoE, one-hot masks).

T tokens, E experts, C places of an expert, D model width.
"""

from dataclasses import KW_ONLY, dataclass

from moec.ir.core import Op, Value, op
from moec.ir.rules import require_float, require_rank, require_size
from moec.ir.types import Dim, Tensor


@op("dispatch_dense")
@dataclass(frozen=True)
class DispatchDense(Op):
    """x[T, D], weights[T, E, C] -> rows[E*C, D], offsets i32[E+1]: every place is a mix of tokens.

    rows[e*C + c] = sum over t of weights[t, e, c] * x[t];
    offsets = 0, C, 2C, ... With `softmax`, weights are logits and first normalised over the tokens t (Soft MoE);
    without, they are used as they are (a one-hot mask dispatches tokens). In fp32 (f64 if x or weights hold it),
    rounded once to x's element type.
    """

    x: Value
    weights: Value
    _: KW_ONLY
    softmax: bool = False

    def infer(self) -> tuple[Tensor, ...]:
        require_rank("x", self.x, 2)
        require_float("x", self.x)
        require_rank("weights", self.weights, 3)
        require_float("weights", self.weights)
        num_tokens, num_experts, places = self.weights.type.shape
        require_size(f"the tokens of weights {self.weights.type}", num_tokens, self.x.type.shape[0], "like those of x")
        rows = Tensor(self.x.type.dtype, (num_experts * places, self.x.type.shape[1]))
        return rows, Tensor("i32", (num_experts + 1,))


@op("combine_dense")
@dataclass(frozen=True)
class CombineDense(Op):
    """rows[E*C, D], weights[T, E, C] -> [T, D]: out[t] = sum over e, c of weights[t, e, c] * rows[e*C + c].

    With `softmax`, weights are logits and first normalised over all places (e, c) of a token. In fp32 (f64 if rows or
    weights hold it), rounded once to rows' element type.
    """

    rows: Value
    weights: Value
    _: KW_ONLY
    softmax: bool = False

    def infer(self) -> tuple[Tensor, ...]:
        require_rank("rows", self.rows, 2)
        require_float("rows", self.rows)
        require_rank("weights", self.weights, 3)
        require_float("weights", self.weights)
        num_tokens, num_experts, places = self.weights.type.shape
        found: Dim = self.rows.type.shape[0]
        require_size("the number of rows", found, num_experts * places, f"for weights {self.weights.type}")
        return (Tensor(self.rows.type.dtype, (num_tokens, self.rows.type.shape[1])),)
