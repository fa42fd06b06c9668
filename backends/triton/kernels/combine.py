"""The weighted sum of a token's rows, in the order of its choices. T tokens, K experts per token, O output width."""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra import cuda

from moec.backends.triton.kernels.address import load_expert, valid_tokens


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["ids", "valid"])
def combine(y, ids, valid, out, tokens, K: tl.constexpr, E: tl.constexpr, O: tl.constexpr,  # noqa: E741
            HAS_VALID: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y[T, K, O], already weighted -> out[T, O]; rows of no expert are not read. Grid: (T / BT, O / BO)."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BO + tl.arange(0, BO)
    inside = (token < tokens)[:, None] & (column < O)[None, :]
    limit = valid_tokens(valid, tokens, HAS_VALID) * K
    total = tl.zeros([BT, BO], dtype=tl.float32)
    if PDL:
        cuda.gdc_wait()
    for k in tl.static_range(0, K):
        pair = token * K + k
        held = load_expert(ids, pair, limit, E) < E
        at = y + pair.to(tl.int64)[:, None] * O + column[None, :]
        total += tl.load(at, mask=inside & held[:, None], other=0.0).to(tl.float32)
    at = out + token.to(tl.int64)[:, None] * O + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["ids", "valid"])
def clear_rows(ids, valid, out, tokens, E: tl.constexpr, O: tl.constexpr, HAS_VALID: tl.constexpr,  # noqa: E741
               BT: tl.constexpr, BO: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Zeros in the rows of out[T, O] whose only choice, ids[T], is no expert. Grid: T / BT."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    e = load_expert(ids, token, valid_tokens(valid, tokens, HAS_VALID), E)
    if PDL:
        cuda.gdc_wait()
    empty = (e == E) & (token < tokens)
    if tl.sum(empty.to(tl.int32), axis=0) > 0:
        for start in tl.range(0, O, BO):
            column = start + tl.arange(0, BO)
            at = out + token.to(tl.int64)[:, None] * O + column[None, :]
            zeros = tl.zeros([BT, BO], dtype=out.dtype.element_ty)
            tl.store(at, zeros, mask=empty[:, None] & (column < O)[None, :])
