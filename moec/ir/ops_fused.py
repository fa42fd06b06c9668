"""Ops that a back end may offer whole; each means exactly the ops it names, one after the other.

T tokens, K experts per token, E experts, D model width, F expert width, O output width, R rows.
"""

from dataclasses import KW_ONLY, dataclass

from moec.ir.core import Value, op, require
from moec.ir.ops_activation import FUSED_LAYOUTS, GatedActivation
from moec.ir.ops_linear import check_bias, check_matrix, check_offsets
from moec.ir.rules import (
    require_at_least,
    require_float,
    require_index,
    require_min_rank,
    require_rank,
    require_shape,
    require_size,
)
from moec.ir.types import Dim, Tensor

LAYOUTS = ("none", "pair", *FUSED_LAYOUTS)


@dataclass(frozen=True)
class FusedActivation(GatedActivation):
    """The attributes of a product followed by an activation.

    `layout`: "none" means not gated (`act`), w_in has F rows; "pair" means w_in is gate and w_up is up, F rows each;
    the others of `GatedActivation` mean that w_in holds both, 2F rows. There is no default: state it.
    """

    def check_fused(self) -> None:
        """The attributes on their own."""
        self.check_gate(*LAYOUTS)
        gated = self.layout != "none" or self.up_shift == 0
        require(gated, "MOEC106", f'up_shift={self.up_shift} needs a gate, and layout="none" has none')

    def check_up(self, w_in: Value, w_up: Value | None, b_up: Value | None, scale_up: Value | None) -> None:
        """w_up comes with layout="pair" and looks like w_in; its bias and scale come only with it."""
        if w_up is None:
            require(self.layout != "pair", "MOEC106", 'layout="pair" needs w_up')
            require(b_up is None and scale_up is None, "MOEC106", "b_up and scale_up go with w_up")
            return
        require(self.layout == "pair", "MOEC106", f'w_up goes with layout="pair", not with layout="{self.layout}"')
        require_shape("w_up", w_up, w_in.type.shape, f"like the gate's weights {w_in.type}")

    def width(self, w_in: Value) -> Dim:
        """F: the rows of w_in, halved where it holds gate and up. Raises MOEC105 when they cannot be halved."""
        rows = w_in.type.shape[-2]
        if self.layout in ("none", "pair"):
            return rows
        even = rows.constant is None or rows.constant % 2 == 0
        require(even, "MOEC105", f"w_in must have an even number of rows for gate and up, found {w_in.type}")
        return rows.floordiv(2)


@op("expert_glu")
@dataclass(frozen=True)
class ExpertGlu(FusedActivation):
    """x[T, D], order[R], offsets i32[E+1], w[E, F or 2F, D] -> [R, F]: gather {k}, grouped_linear, then glu or act.

    Optional: b and scale like grouped_linear's for w; w_up[E, F, D], b_up and scale_up with layout="pair". The product
    is not rounded before the activation. Rows from offsets[E] on come out as zeros.
    """

    x: Value
    order: Value
    offsets: Value
    w: Value
    _: KW_ONLY
    b: Value | None = None
    scale: Value | None = None
    w_up: Value | None = None
    b_up: Value | None = None
    scale_up: Value | None = None
    k: int

    def infer(self) -> tuple[Tensor, ...]:
        require_rank("x", self.x, 2)
        require_float("x", self.x)
        require_index("order", self.order)
        require_rank("order", self.order, 1)
        require_at_least("k", self.k, 1)
        require_rank("w", self.w, 3)
        self.check_fused()
        self.check_up(self.w, self.w_up, self.b_up, self.scale_up)
        check_offsets(self.offsets, self.w.type.shape[0], f"for w {self.w.type}")
        check_matrix(self.x, self.w, w_name="w", scale=self.scale, scale_name="scale")
        check_bias(self.b, self.w, name="b", dtype=self.x.type.dtype)
        if self.w_up is not None:
            check_matrix(self.x, self.w_up, w_name="w_up", scale=self.scale_up, scale_name="scale_up")
            check_bias(self.b_up, self.w_up, name="b_up", dtype=self.x.type.dtype)
        return (Tensor(self.x.type.dtype, (self.order.type.shape[0], self.width(self.w))),)


@dataclass(frozen=True)
class FeedForward(FusedActivation):
    """What an FFN's two products have in common, for one expert and for many."""

    def check_products(
        self, x: Value, matrices: tuple[Value, Value, Value | None], more: tuple[Value | None, ...], *, rank: int
    ) -> Tensor:
        """Check w_in, w_out and w_up of this rank with `more` = their biases, then their scales; the result's type."""
        w_in, w_out, w_up = matrices
        b_in, b_out, b_up, scale_in, scale_out, scale_up = more
        require_float("x", x)
        require_rank("w_in", w_in, rank)
        require_rank("w_out", w_out, rank)
        self.check_fused()
        self.check_up(w_in, w_up, b_up, scale_up)
        dtype = x.type.dtype
        check_matrix(x, w_in, w_name="w_in", scale=scale_in, scale_name="scale_in")
        check_bias(b_in, w_in, name="b_in", dtype=dtype)
        if w_up is not None:
            check_matrix(x, w_up, w_name="w_up", scale=scale_up, scale_name="scale_up")
            check_bias(b_up, w_up, name="b_up", dtype=dtype)
        hidden = Value("hidden", Tensor(dtype, (*x.type.shape[:-1], self.width(w_in))))
        check_matrix(hidden, w_out, w_name="w_out", scale=scale_out, scale_name="scale_out")
        check_bias(b_out, w_out, name="b_out", dtype=dtype)
        return Tensor(dtype, (*x.type.shape[:-1], w_out.type.shape[-2]))


@op("expert_ffn")
@dataclass(frozen=True)
class ExpertFfn(FeedForward):
    """x[T, D], experts[T, K], weights[T, K], w_in[E, F or 2F, D], w_out[E, O, F] -> [T, O]: a dropless MoE layer.

    group {experts=E}, gather {k=K}, grouped_linear with w_in, glu or act, grouped_linear with w_out, combine. Ids
    outside 0..E-1 are left out, as in `group`. Values between these ops need not be rounded to x's element type.
    Optional: b_in, b_out, scale_in, scale_out like grouped_linear's; w_up[E, F, D], b_up, scale_up with layout="pair".
    """

    x: Value
    experts: Value
    weights: Value
    w_in: Value
    w_out: Value
    _: KW_ONLY
    b_in: Value | None = None
    b_out: Value | None = None
    scale_in: Value | None = None
    scale_out: Value | None = None
    w_up: Value | None = None
    b_up: Value | None = None
    scale_up: Value | None = None

    def infer(self) -> tuple[Tensor, ...]:
        require_rank("x", self.x, 2)
        require_rank("experts", self.experts, 2)
        require_index("experts", self.experts)
        require_float("weights", self.weights)
        tokens = self.experts.type.shape[0]
        require_size(
            f"the tokens of experts {self.experts.type}", tokens, self.x.type.shape[0], f"like x {self.x.type}"
        )
        require_shape("weights", self.weights, self.experts.type.shape, f"like experts {self.experts.type}")
        biases = (self.b_in, self.b_out, self.b_up)
        scales = (self.scale_in, self.scale_out, self.scale_up)
        result = self.check_products(self.x, (self.w_in, self.w_out, self.w_up), (*biases, *scales), rank=3)
        num_experts = self.w_in.type.shape[0]
        require_size("the experts of w_out", self.w_out.type.shape[0], num_experts, f"like w_in {self.w_in.type}")
        return (result,)


@op("dense_ffn")
@dataclass(frozen=True)
class DenseFfn(FeedForward):
    """x[..., D], w_in[F or 2F, D], w_out[O, F] -> [..., O]: linear with w_in, glu or act, linear with w_out.

    The one-expert form of `expert_ffn`, without routing. Optional: b_in, b_out, scale_in, scale_out like linear's;
    w_up[F, D], b_up, scale_up with layout="pair". Values between need not be rounded to x's element type.
    """

    x: Value
    w_in: Value
    w_out: Value
    _: KW_ONLY
    b_in: Value | None = None
    b_out: Value | None = None
    scale_in: Value | None = None
    scale_out: Value | None = None
    w_up: Value | None = None
    b_up: Value | None = None
    scale_up: Value | None = None

    def infer(self) -> tuple[Tensor, ...]:
        require_min_rank("x", self.x, 1)
        biases = (self.b_in, self.b_out, self.b_up)
        scales = (self.scale_in, self.scale_out, self.scale_up)
        return (self.check_products(self.x, (self.w_in, self.w_out, self.w_up), (*biases, *scales), rank=2),)
