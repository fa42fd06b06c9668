"""Derivatives of activations inside kernels, in fp32: what autograd gives for `activation.py`'s functions.

At a kink the derivative is torch's: 0 for relu at 0, and a clamp passes gradients at its limit.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from moec.backends.triton.kernels.activation import function, tanh


@triton.jit
def slope(x, FN: tl.constexpr, ALPHA: tl.constexpr):
    """fn'(x) of the activation's name."""
    if FN == "silu":
        s = 1.0 / (1.0 + tl.exp(-ALPHA * x))
        y = s * (1.0 + ALPHA * x * (1.0 - s))
    elif FN == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif FN == "gelu_tanh":
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        y = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    elif FN == "quick_gelu":
        s = 1.0 / (1.0 + tl.exp(-1.702 * x))
        y = s * (1.0 + 1.702 * x * (1.0 - s))
    elif FN == "relu":
        y = tl.where(x <= 0.0, 0.0, 1.0)
    elif FN == "relu2":
        y = tl.where(x <= 0.0, 0.0, 2.0 * x)
    elif FN == "sigmoid":
        s = 1.0 / (1.0 + tl.exp(-x))
        y = s * (1.0 - s)
    elif FN == "tanh":
        t = tanh(x)
        y = 1.0 - t * t
    elif FN == "softplus":
        y = 1.0 / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(FN == "identity")
        y = x * 0.0 + 1.0
    return y


@triton.jit
def activate_back(grad, gate, up, FN: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, AFTER: tl.constexpr,
                  SHIFT: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """The gradient of `activate`'s result, f32[...] -> those of gate and of up; without GATED the second is unused."""
    held = gate
    if LIMIT is not None and not AFTER:
        held = tl.where(gate > LIMIT, LIMIT, gate)
    d = slope(held, FN, ALPHA)
    if LIMIT is not None and not AFTER:
        d = tl.where(gate > LIMIT, 0.0, d)
    d_up = d
    if GATED:
        a = function(held, FN, ALPHA)
        if LIMIT is not None and AFTER:
            d = tl.where(a > LIMIT, 0.0, d)
            a = tl.where(a > LIMIT, LIMIT, a)
        d_up = grad * a
        if LIMIT is not None:
            d_up = tl.where((up > LIMIT) | (up < -LIMIT), 0.0, d_up)
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        d = d * (up + SHIFT)
    elif LIMIT is not None and AFTER:
        d = tl.where(function(held, FN, ALPHA) > LIMIT, 0.0, d)
    return grad * d, d_up
