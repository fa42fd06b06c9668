"""Activations: of one value (`act`), and gated (`glu`), with the clamps, slopes and layouts that models use.

F expert width.
"""

from dataclasses import KW_ONLY, dataclass

from moec.ir.core import Op, Value, op, require
from moec.ir.rules import require_choice, require_float, require_min_rank, require_same_dtype, require_shape
from moec.ir.types import Dim, Tensor

FUNCTIONS = (
    "identity",
    "silu",
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "relu",
    "relu2",
    "sigmoid",
    "tanh",
    "softplus",
)
# How gate and up lie in the outputs of one matrix: halves, or every other column.
FUSED_LAYOUTS = ("concat", "concat_up_first", "interleaved", "interleaved_up_first")


@dataclass(frozen=True)
class Activation(Op):
    """The attributes every activation has.

    `fn`: identity, silu x*sigmoid(alpha*x), gelu (erf), gelu_tanh, quick_gelu x*sigmoid(1.702*x), relu,
    relu2 max(x, 0)^2, sigmoid, tanh, softplus log(1+e^x).
    `alpha`: the slope inside silu's sigmoid, 1 for every other function.
    `limit`: a clamp. x is at most `limit` before fn; with `clamp_after` it is fn(x) that is at most `limit`.
    Evaluated in at least fp32 and rounded once at the end.
    """

    _: KW_ONLY
    fn: str
    alpha: float = 1.0
    limit: float | None = None
    clamp_after: bool = False

    def check_activation(self) -> None:
        """Raises MOEC102 for values out of range, MOEC106 for attributes that do not go together."""
        require_choice("fn", self.fn, FUNCTIONS)
        alone = self.alpha == 1 or self.fn == "silu"
        require(alone, "MOEC106", f'alpha={self.alpha} goes with fn="silu", not with fn="{self.fn}"')
        require(self.limit is None or self.limit > 0, "MOEC102", f"limit={self.limit} must be above 0")
        message = "clamp_after=true needs limit, the value to clamp to"
        require(not self.clamp_after or self.limit is not None, "MOEC106", message)


@dataclass(frozen=True)
class GatedActivation(Activation):
    """The attributes every gated activation has: fn(gate) * (up + up_shift), gate being the x of `Activation`.

    `limit` also clamps up to -limit..limit, before `up_shift` is added; `clamp_after` does not change that.
    `layout` says where gate and up are: "pair" two values (or two matrices); in one value of 2F columns "concat"
    gate then up, "concat_up_first", "interleaved" gate in columns 0, 2, 4..., "interleaved_up_first".
    """

    _: KW_ONLY
    layout: str
    up_shift: float = 0.0

    def check_gate(self, *allowed: str) -> None:
        """`check_activation`, and the layout is one of those allowed."""
        self.check_activation()
        require_choice("layout", self.layout, allowed)


def half(width: Dim, name: str, value: Value) -> Dim:
    """The columns of gate in a value that holds gate and up. Raises MOEC105 when they cannot be halved."""
    even = width.constant is None or width.constant % 2 == 0
    require(even, "MOEC105", f"{name} must have an even number of columns for gate and up, found {value.type}")
    return width.floordiv(2)


@op("act")
@dataclass(frozen=True)
class Act(Activation):
    """x[...] -> fn(x), elementwise, in x's element type. `fn`, `alpha`, `limit`, `clamp_after`: see `Activation`."""

    x: Value

    def infer(self) -> tuple[Tensor, ...]:
        require_float("x", self.x)
        self.check_activation()
        return (self.x.type,)


@op("glu")
@dataclass(frozen=True)
class Glu(GatedActivation):
    """gate[..., F], up[..., F] -> [..., F], or one value [..., 2F] -> [..., F]: fn(gate) * (up + up_shift).

    With `up` the layout is "pair"; without it `gate` holds both, and `layout` says how. In gate's element type.
    Clamps and shifts: see `GatedActivation`. gpt-oss is fn="silu", alpha=1.702, limit=7, up_shift=1, interleaved.
    """

    gate: Value
    up: Value | None = None
    _: KW_ONLY
    layout: str = "pair"

    def infer(self) -> tuple[Tensor, ...]:
        require_float("gate", self.gate)
        require_min_rank("gate", self.gate, 1)
        if self.up is not None:
            self.check_activation()
            require(self.layout == "pair", "MOEC106", f'with up, layout must be "pair", found "{self.layout}"')
            require_same_dtype("up", self.up, "gate", self.gate)
            require_shape("up", self.up, self.gate.type.shape, f"like gate {self.gate.type}")
            return (self.gate.type,)
        self.check_gate(*FUSED_LAYOUTS)
        *outer, width = self.gate.type.shape
        return (Tensor(self.gate.type.dtype, (*outer, half(width, "gate", self.gate))),)
