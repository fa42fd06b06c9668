"""Activations, plain and gated. F expert width; the result has the element type of what goes in."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moec.backends.reference.dtypes import wide
from moec.ir.formula import Formula, fold
from moec.ir.ops_activation import Activation, GatedActivation


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + e^x) for every x: torch's own gives x itself above a threshold, which f64 can tell apart."""
    return torch.logaddexp(x, torch.zeros_like(x))


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": softplus,
}


def activate(x: torch.Tensor, op: Activation) -> torch.Tensor:
    """x[...] -> fn(x) in fp32 (f64 for f64), with op's slope and clamps, not rounded."""
    x = x.to(wide(x))
    if op.limit is not None and not op.clamp_after:
        x = x.clamp(max=op.limit)
    x = x * torch.sigmoid(op.alpha * x) if op.fn == "silu" and op.alpha != 1 else FUNCTIONS[op.fn](x)
    if op.limit is not None and op.clamp_after:
        x = x.clamp(max=op.limit)
    return x


_MORE: dict[str, Callable[..., torch.Tensor]] = {
    **FUNCTIONS,
    "exp": torch.exp,
    "square": torch.square,
    "abs": torch.abs,
    "neg": torch.neg,
    "min": torch.minimum,
    "max": torch.maximum,
    "+": torch.add,
    "-": torch.sub,
    "*": torch.mul,
    "/": torch.div,
}


def pointwise(a: torch.Tensor, b: torch.Tensor | None, formula: Formula) -> torch.Tensor:
    """a[...], b[...]? -> the formula's value in fp32 (f64 for f64), rounded once."""
    kind = wide(a)
    given = {"a": a.to(kind), "b": a.to(kind) if b is None else b.to(kind)}

    def leaf(at: Formula) -> torch.Tensor:
        return given[at.fn] if at.fn in given else torch.tensor(at.value, dtype=kind, device=a.device)

    return fold(formula, leaf, lambda fn, args: _MORE[fn](*args)).to(a.dtype)


def act(x: torch.Tensor, op: Activation) -> torch.Tensor:
    """x[...] -> fn(x), rounded once."""
    return activate(x, op).to(x.dtype)


def glu(gate: torch.Tensor, up: torch.Tensor | None, op: GatedActivation) -> torch.Tensor:
    """gate[..., F], up[..., F], or gate[..., 2F] that holds both -> fn(gate) * (up + up_shift), rounded once."""
    if up is None:
        gate, up = split(gate, op.layout)
    up = up.to(wide(up))
    if op.limit is not None:
        up = up.clamp(-op.limit, op.limit)
    return (activate(gate, op) * (up + op.up_shift)).to(gate.dtype)


def split(both: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up of [..., 2F] as views, by where the layout puts them."""
    if layout.startswith("interleaved"):
        first, second = both[..., 0::2], both[..., 1::2]
    else:
        first, second = both.chunk(2, dim=-1)
    return (second, first) if layout.endswith("up_first") else (first, second)


def fused(gate: torch.Tensor, up: torch.Tensor | None, op: GatedActivation) -> torch.Tensor:
    """The activation behind a product: `glu`, or `act` where the layout says that there is no gate."""
    return act(gate, op) if op.layout == "none" else glu(gate, up, op)
