"""What the activations mean, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x) without overflow."""
    if math.isnan(x):
        return x
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """log(1 + e^x) without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _tanh_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def function(name: str, x: float, alpha: float = 1.0) -> float:
    """fn(x)."""
    if math.isnan(x):
        return x
    table = {
        "identity": lambda: x,
        "silu": lambda: x * sigmoid(alpha * x),
        "gelu": lambda: 0.5 * x * math.erfc(-x / math.sqrt(2)),
        "gelu_tanh": lambda: _tanh_gelu(x),
        "quick_gelu": lambda: x * sigmoid(1.702 * x),
        "relu": lambda: max(x, 0.0),
        "relu2": lambda: max(x, 0.0) ** 2,
        "sigmoid": lambda: sigmoid(x),
        "tanh": lambda: math.tanh(x),
        "softplus": lambda: softplus(x),
    }
    return table[name]()


def at_most(x: float, limit: float | None) -> float:
    """x clamped from above; not-a-number stays."""
    return x if limit is None or math.isnan(x) else min(x, limit)


def act(x: float, at: Mapping[str, object]) -> float:
    """The `act` op on one number; `at` holds its attributes."""
    limit = at.get("limit")
    assert limit is None or isinstance(limit, float)
    after = bool(at.get("clamp_after", False))
    y = function(str(at["fn"]), x if after else at_most(x, limit), float(str(at.get("alpha", 1.0))))
    return at_most(y, limit) if after else y


def glu(gate: float, up: float, at: Mapping[str, object]) -> float:
    """The `glu` op on one gate and its up."""
    limit = at.get("limit")
    if isinstance(limit, float) and not math.isnan(up):
        up = max(min(up, limit), -limit)
    return act(gate, at) * (up + float(str(at.get("up_shift", 0.0))))


def pairs(row: Sequence[float], layout: str) -> list[tuple[float, float]]:
    """gate and up of a row that holds both."""
    half = len(row) // 2
    if layout.startswith("interleaved"):
        found = list(zip(row[0::2], row[1::2], strict=True))
    else:
        found = list(zip(row[:half], row[half:], strict=True))
    return [(b, a) for a, b in found] if layout.endswith("up_first") else found


def activated(row: Sequence[float], up: Sequence[float] | None, at: Mapping[str, object]) -> list[float]:
    """A row of a fused op's first product after its activation."""
    if up is not None:
        return [glu(g, u, at) for g, u in zip(row, up, strict=True)]
    if at["layout"] == "none":
        return [act(x, at) for x in row]
    return [glu(g, u, at) for g, u in pairs(row, str(at["layout"]))]
