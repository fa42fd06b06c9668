"""The activation between the two products, in few passes and without new memory. F expert width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from moec.backends.reference.activations import fused
from moec.ir.ops_fused import FusedActivation

aten = torch.ops.aten


def _gelu(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    # With an `out` that is not contiguous, torch 2.13's own writes elsewhere.
    return aten.gelu.out(x, out=out) if out.is_contiguous() else out.copy_(aten.gelu(x))


_INTO: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "identity": lambda x, out: out.copy_(x),
    "silu": lambda x, out: aten.silu.out(x, out=out),
    "gelu": _gelu,
    "gelu_tanh": lambda x, out: aten.gelu.out(x, approximate="tanh", out=out),
    "relu": lambda x, out: torch.clamp(x, min=0, out=out),
    "relu2": lambda x, out: torch.clamp(x, min=0, out=out).square_(),
    "sigmoid": lambda x, out: torch.sigmoid(x, out=out),
    "tanh": lambda x, out: torch.tanh(x, out=out),
}

# The same into any memory, the operand's own where that is quickest.
_OVER: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "silu": lambda x: F.silu(x, inplace=True),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu_,
    "relu2": lambda x: torch.relu_(x).square_(),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
}


class FastActivation:
    """fn(gate) * (up + up_shift) or fn(x), with the attributes of a fused op."""

    def __init__(self, op: FusedActivation) -> None:
        self._op = op
        plain = op.limit is None and op.alpha == 1 and op.up_shift == 0
        self._into = _INTO.get(op.fn) if plain else None
        self._over = _OVER.get(op.fn) if plain else None
        self.gated = op.layout != "none"
        self._interleaved = op.layout.startswith("interleaved")
        self._pair = replace(op, layout="pair") if self.gated else op
        self._up_first = op.layout.endswith("up_first")

    def __call__(self, h: torch.Tensor, up: torch.Tensor | None, out: torch.Tensor, axis: int = -1) -> torch.Tensor:
        """h[..., F or 2F, ...] and up[..., F, ...]?, both along `axis` -> out, which has F there."""
        if not self.gated or up is not None:
            gate = h
        else:
            gate, up = self._split(h, axis)
        if self._into is not None:
            self._into(gate, out)
            return out if up is None else out.mul_(up)
        return out.copy_(self._slow(gate, up))

    def over(self, h: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        """h[M, F or 2F] and up[M, F]? -> [M, F] in any memory, h's own included: for few rows of small experts."""
        if up is None and self.gated:
            h, up = self._split(h, -1)
        if self._over is None:
            return self._slow(h, up).to(h.dtype)
        a = self._over(h)
        return a if up is None else a.mul_(up)

    def _split(self, h: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of gate and up."""
        axis %= h.dim()
        width = h.shape[axis] // 2
        if self._interleaved:
            both = h.unflatten(axis, (width, 2))
            first, second = both.select(axis + 1, 0), both.select(axis + 1, 1)
        else:
            first, second = h.narrow(axis, 0, width), h.narrow(axis, width, width)
        return (second, first) if self._up_first else (first, second)

    def _slow(self, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        """By the op's meaning, in fp32."""
        return fused(gate, up, self._op if up is None else self._pair)
