"""Normalisation and scaling of rows, with one set of parameters or one for each expert. R rows, E experts, D width."""

from dataclasses import KW_ONLY, dataclass

from moec.ir.core import Op, Value, op, require
from moec.ir.ops_linear import check_offsets
from moec.ir.rules import require_choice, require_dtype, require_float, require_min_rank, require_rank, require_shape
from moec.ir.types import Tensor


@op("norm")
@dataclass(frozen=True)
class Norm(Op):
    """x[..., D], w[D]?, b[D]? -> [..., D]; or x[R, D], offsets i32[E+1], w[E, D]?, b[E, D]? -> [R, D] per expert.

    kind="rms": x / sqrt(mean(x^2) + eps). kind="layer": (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps).
    kind="none": x as it is, with eps=0: only what follows. Then times (w + w_shift) and plus b, where present. Over the
    last axis, in fp32 (f64 for f64), rounded once at the end. With offsets, row r of expert e uses w[e] and b[e]; rows
    from offsets[E] on come out as zeros.
    """

    x: Value
    _: KW_ONLY
    offsets: Value | None = None
    w: Value | None = None
    b: Value | None = None
    kind: str
    eps: float
    w_shift: float = 0.0

    def infer(self) -> tuple[Tensor, ...]:
        require_float("x", self.x)
        require_choice("kind", self.kind, ("rms", "layer", "none"))
        require(self.eps >= 0, "MOEC102", f"eps={self.eps} must be at least 0")
        if self.kind == "none":
            require(self.eps == 0, "MOEC106", f'eps={self.eps} goes with a norm, not with kind="none"')
            some = self.w is not None or self.b is not None
            require(some, "MOEC106", 'kind="none" scales and shifts: it needs w or b')
        require(self.w is not None or self.w_shift == 0, "MOEC106", f"w_shift={self.w_shift} is added to w: it needs w")
        for name, value in (("w", self.w), ("b", self.b)):
            if value is not None:
                self._check_parameter(name, value)
        if self.offsets is None:
            require_min_rank("x", self.x, 1)
            return (self.x.type,)
        require_rank("x", self.x, 2)
        per_expert = self.w or self.b
        require(per_expert is not None, "MOEC106", "offsets go with w or b of each expert, and both are absent")
        assert per_expert is not None
        check_offsets(self.offsets, per_expert.type.shape[0], f"for parameters {per_expert.type}")
        return (self.x.type,)

    def _check_parameter(self, name: str, value: Value) -> None:
        require_min_rank("x", self.x, 1)
        require_rank(name, value, 1 if self.offsets is None else 2)
        require_dtype(name, value, *dict.fromkeys((self.x.type.dtype, "f32")))
        width = self.x.type.shape[-1]
        shape = (width,) if self.offsets is None else (value.type.shape[0], width)
        require_shape(name, value, shape, f"for x {self.x.type}")
        if self.w is not None and value is self.b:
            require_shape(name, value, self.w.type.shape, f"like w {self.w.type}")


@op("batch_norm")
@dataclass(frozen=True)
class BatchNorm(Op):
    """x[R, D], offsets i32[E+1], mean[E, D], var[E, D], w[E, D]?, b[E, D]? -> [R, D] by statistics that are given.

    Row r of expert e: (x - mean[e]) / sqrt(var[e] + eps), then times w[e] and plus b[e], where present. In fp32 (f64
    for f64), rounded once at the end. Rows from offsets[E] on come out as zeros.
    """

    x: Value
    offsets: Value
    mean: Value
    var: Value
    _: KW_ONLY
    w: Value | None = None
    b: Value | None = None
    eps: float

    def infer(self) -> tuple[Tensor, ...]:
        require_float("x", self.x)
        require_rank("x", self.x, 2)
        require(self.eps >= 0, "MOEC102", f"eps={self.eps} must be at least 0")
        require_rank("mean", self.mean, 2)
        shape = (self.mean.type.shape[0], self.x.type.shape[1])
        for name, value in (("mean", self.mean), ("var", self.var), ("w", self.w), ("b", self.b)):
            if value is not None:
                require_dtype(name, value, *dict.fromkeys((self.x.type.dtype, "f32")))
                require_shape(name, value, shape, f"for x {self.x.type} and mean {self.mean.type}")
        check_offsets(self.offsets, shape[0], f"for mean {self.mean.type}")
        return (self.x.type,)
