"""Matrix products: one matrix for all rows, or one for each expert's rows; int8 weights and rows.

R rows, E experts, C inputs, N outputs, G groups of a row that share a scale.
"""

from dataclasses import KW_ONLY, dataclass

from moec.ir.core import Op, Value, op, require
from moec.ir.rules import (
    require_at_least,
    require_choice,
    require_dtype,
    require_float,
    require_index,
    require_min_rank,
    require_rank,
    require_same_dtype,
    require_shape,
    require_size,
)
from moec.ir.types import FLOATS, Dim, Tensor


def check_matrix(x: Value, w: Value, *, w_name: str, scale: Value | None, scale_name: str) -> None:
    """Shared by all products: w holds x's type, or i8 with one f32 scale for each output; x is C wide."""
    if w.type.dtype == "i8":
        message = f"{w_name} is {w.type}: i8 weights need {scale_name}, one for each output"
        require(scale is not None, "MOEC106", message, hint="add the second result of quantize_weight")
    elif scale is not None:
        require(False, "MOEC106", f"{scale_name} goes with i8 weights, but {w_name} is {w.type}")
    if scale is not None:
        require_dtype(scale_name, scale, "f32")
        require_shape(scale_name, scale, w.type.shape[:-1], f"for {w_name} {w.type}")
    else:
        require_same_dtype(w_name, w, "x", x)
    width = x.type.shape[-1]
    require_size(f"the inputs of {w_name}", w.type.shape[-1], width, f"like the rows of {x.type}")


def check_bias(bias: Value | None, w: Value, *, name: str, dtype: str) -> None:
    """A bias has one number for each output, in the result's type or in f32."""
    if bias is None:
        return
    require_dtype(name, bias, *dict.fromkeys((dtype, "f32")))
    require_shape(name, bias, w.type.shape[:-1], f"for weights {w.type}")


def result_dtype(x: Value, x_scale: Value | None, w: Value, dtype: str | None) -> str:
    """The element type of a product; checks that i8 rows come with their scale, with i8 weights and a result type."""
    if dtype is not None:
        require_choice("dtype", dtype, FLOATS)
    if x.type.dtype != "i8":
        require_float("x", x)
        require(x_scale is None, "MOEC106", f"x_scale goes with i8 rows, but x is {x.type}")
        return dtype or x.type.dtype
    require(x_scale is not None, "MOEC106", f"x is {x.type}: i8 rows need x_scale")
    require_dtype("w", w, "i8")
    require(dtype is not None, "MOEC106", "i8 rows need dtype, the type of the result")
    assert x_scale is not None
    assert dtype is not None
    require_dtype("x_scale", x_scale, "f32")
    require_rank("x_scale", x_scale, x.type.rank)
    parts = x_scale.type.shape[-1]
    require_shape("x_scale", x_scale, (*x.type.shape[:-1], parts), f"for x {x.type}")
    width, count = x.type.shape[-1].constant, parts.constant
    divides = width is None or count is None or (count > 0 and width % count == 0)
    require(divides, "MOEC105", f"the {parts} parts of x_scale must divide the width of x {x.type}")
    return dtype


@op("linear")
@dataclass(frozen=True)
class Linear(Op):
    """x[..., C], w[N, C], b[N]?, scale f32[N]?, x_scale f32[..., G]? -> [..., N]: x @ w.T + b.

    Accumulates in at least fp32 (f64 for f64) and rounds once at the end. i8 weights count as w * scale. i8 rows
    count as x * x_scale (the scale of its group of C/G inputs); their products are summed in i32 within a group.
    The result has x's element type unless `dtype` says otherwise.
    """

    x: Value
    w: Value
    _: KW_ONLY
    b: Value | None = None
    scale: Value | None = None
    x_scale: Value | None = None
    dtype: str | None = None

    def infer(self) -> tuple[Tensor, ...]:
        require_min_rank("x", self.x, 1)
        require_rank("w", self.w, 2)
        dtype = result_dtype(self.x, self.x_scale, self.w, self.dtype)
        check_matrix(self.x, self.w, w_name="w", scale=self.scale, scale_name="scale")
        check_bias(self.b, self.w, name="b", dtype=dtype)
        return (Tensor(dtype, (*self.x.type.shape[:-1], self.w.type.shape[0])),)


@op("grouped_linear")
@dataclass(frozen=True)
class GroupedLinear(Op):
    """rows[R, C], offsets i32[E+1], w[E, N, C], b[E, N]?, scale f32[E, N]?, x_scale f32[R, G]? -> [R, N].

    Row r with offsets[e] <= r < offsets[e+1] gives rows[r] @ w[e].T + b[e], accumulated and rounded as in `linear`.
    Rows from offsets[E] on belong to no expert and come out as zeros, without bias. Experts without rows are not
    touched. i8 weights, i8 rows and `dtype` as in `linear`.
    """

    rows: Value
    offsets: Value
    w: Value
    _: KW_ONLY
    b: Value | None = None
    scale: Value | None = None
    x_scale: Value | None = None
    dtype: str | None = None

    def infer(self) -> tuple[Tensor, ...]:
        require_rank("rows", self.rows, 2)
        require_rank("w", self.w, 3)
        check_offsets(self.offsets, self.w.type.shape[0], f"for w {self.w.type}")
        dtype = result_dtype(self.rows, self.x_scale, self.w, self.dtype)
        check_matrix(self.rows, self.w, w_name="w", scale=self.scale, scale_name="scale")
        check_bias(self.b, self.w, name="b", dtype=dtype)
        return (Tensor(dtype, (self.rows.type.shape[0], self.w.type.shape[1])),)


def check_offsets(offsets: Value, num_experts: Dim, why: str) -> None:
    """Offsets are i32[E+1]."""
    require_index("offsets", offsets)
    require_rank("offsets", offsets, 1)
    require_shape("offsets", offsets, (num_experts + 1,), why)


@op("quantize_rows")
@dataclass(frozen=True)
class QuantizeRows(Op):
    """x[..., C] -> q i8[..., C], scale f32[..., G]: symmetric, one scale for each of `groups` equal parts of a row.

    In fp32: scale = max |x| over the part, divided by 127, or 1 where all of it is 0; q = x / scale rounded half to
    even, within -127..127.
    """

    x: Value
    _: KW_ONLY
    groups: int = 1

    def infer(self) -> tuple[Tensor, ...]:
        require_min_rank("x", self.x, 1)
        require_float("x", self.x)
        require_at_least("groups", self.groups, 1)
        width = self.x.type.shape[-1].constant
        divides = width is None or width % self.groups == 0
        require(divides, "MOEC102", f"groups={self.groups} must divide the width of x {self.x.type}")
        return self.x.type.with_dtype("i8"), Tensor("f32", (*self.x.type.shape[:-1], Dim.of(self.groups)))
