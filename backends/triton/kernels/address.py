"""Where an expert's weights lie, and which expert a pair of a token and a choice has.

A matrix is a base pointer and constant strides (experts stacked in one tensor), or a table of E pointers as int64.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def expert_base(base, e, STRIDE_E: tl.constexpr, LISTED: tl.constexpr, DTYPE: tl.constexpr):
    """The address of expert e's matrix. With LISTED, base is the table i64[E]: 1 for addresses that 16 divides."""
    # One return: Triton 3.6 wants the types of several to agree, even of those that are not compiled.
    if LISTED == 1:
        at = tl.multiple_of(tl.load(base + e).to(tl.pointer_type(DTYPE)), 16)
    elif LISTED:
        at = tl.load(base + e).to(tl.pointer_type(DTYPE))
    else:
        at = base + e.to(tl.int64) * STRIDE_E
    return at


@triton.jit
def vector_base(base, e, STRIDE_E: tl.constexpr, LISTED: tl.constexpr, DTYPE: tl.constexpr):
    """The address of expert e's bias or scales, which need not be aligned."""
    if LISTED:  # noqa: SIM108
        at = tl.load(base + e).to(tl.pointer_type(DTYPE))
    else:
        at = base + e.to(tl.int64) * STRIDE_E
    return at


@triton.jit
def load_expert(ids, pair, limit, E: tl.constexpr):
    """ids[T * K] at `pair` as int32: 0..E-1, or E for "no expert": an id out of range, or a pair from `limit` on."""
    e = tl.load(ids + pair, mask=pair < limit, other=E)
    return tl.where((e >= 0) & (e < E), e, E).to(tl.int32)


@triton.jit
def valid_tokens(valid, tokens, HAS_VALID: tl.constexpr):
    """How many rows count: `tokens`, or the number on the device if that is less."""
    if HAS_VALID:
        return tl.minimum(tl.load(valid).to(tl.int32), tokens)
    return tokens


@triton.jit
def dot(a, w, total, PRECISION: tl.constexpr):
    """total + a @ w with fp32 sums. "wide" widens first, for the interpreter, whose products of bf16 are not right."""
    if PRECISION == "wide":
        return tl.dot(a.to(tl.float32), w.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, w.to(a.dtype), total, input_precision=PRECISION)
