"""Activations inside kernels, in fp32: what `moec.backends.reference.activations` says, not-a-numbers included."""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh(x); near 0 a polynomial, because 1 - 2 / (e^2x + 1) cancels there."""
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    square = x * x
    near = x * (1.0 + square * (-0.33333334 + square * (0.13333334 - square * 0.053968254)))
    return tl.where(tl.abs(x) < 0.1, near, far)


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|); a series where that log is near 0."""
    small = tl.exp(-tl.abs(x))
    series = small * (1.0 - small * (0.5 - small * (0.33333334 - small * 0.25)))
    return tl.where(x < 0.0, 0.0, x) + tl.where(small < 0.03, series, tl.log(1.0 + small))


@triton.jit
def function(x, FN: tl.constexpr, ALPHA: tl.constexpr):
    """fn(x) of the activation's name; `where` keeps not-a-numbers, which minimum and maximum may drop."""
    if FN == "silu":
        y = x / (1.0 + tl.exp(-ALPHA * x))
    elif FN == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FN == "gelu_tanh":
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif FN == "quick_gelu":
        y = x / (1.0 + tl.exp(-1.702 * x))
    elif FN == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    elif FN == "relu2":
        positive = tl.where(x < 0.0, 0.0, x)
        y = positive * positive
    elif FN == "sigmoid":
        y = 1.0 / (1.0 + tl.exp(-x))
    elif FN == "tanh":
        y = tanh(x)
    elif FN == "softplus":
        y = softplus(x)
    else:
        tl.static_assert(FN == "identity")
        y = x
    return y


@triton.jit
def activate(gate, up, FN: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, AFTER: tl.constexpr,
             SHIFT: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """gate and up, f32[...] -> fn(gate) * (up + SHIFT) with the clamps; without GATED fn(gate), and up is not read."""
    if LIMIT is not None and not AFTER:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
    a = function(gate, FN, ALPHA)
    if LIMIT is not None and AFTER:
        a = tl.where(a > LIMIT, LIMIT, a)
    if GATED:
        if LIMIT is not None:
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        a = a * (up + SHIFT)
    return a
