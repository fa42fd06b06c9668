"""Gradients of the experts' matrices and biases: sums over an expert's rows, in the rows' order.

T tokens, K experts per token, P pairs (token * K + choice), E experts, N outputs and C inputs of a matrix. `meta` as in
group.py; AT_ORDER is where its order of pairs starts. Rows lie by pair in the order of `meta`, or, where gathered, by
token. Experts without rows get zeros.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from moec.backends.triton.kernels.address import dot, expert_base, vector_base
from moec.backends.triton.kernels.tiles import place_of


@triton.jit
def row_of(order, row, real, K: tl.constexpr, GATHER: tl.constexpr):
    """Where a row of an operand is: by its token if gathered."""
    if GATHER:
        row = tl.load(order + row, mask=real, other=0) // K
    return row.to(tl.int64)


@triton.jit(do_not_specialize=["at_order"])
def weight_gradient(outs, ins, meta, dw, at_order,
                    K: tl.constexpr, N: tl.constexpr, C: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
                    FROM: tl.constexpr, GATHER_OUTS: tl.constexpr, GATHER_INS: tl.constexpr,
                    W_E: tl.constexpr, W_N: tl.constexpr, W_C: tl.constexpr, LISTED: tl.constexpr,
                    W_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """outs[.., OUTS] from column FROM on, ins[.., INS] -> dw[E, N, C], outs^T @ ins of each expert's rows.
    Grid: E * (N / BM) * (C / BN). ALIGNED says whether 16 divides dw's address; compiled kernels differ by it."""
    DOWN: tl.constexpr = (N + BM - 1) // BM
    ACROSS: tl.constexpr = (C + BN - 1) // BN
    e = tl.program_id(0) // (DOWN * ACROSS)
    block, column = place_of(tl.program_id(0) % (DOWN * ACROSS), DOWN, ACROSS, GROUP)
    first, end = tl.load(meta + 4 + e), tl.load(meta + 5 + e)
    order = meta + at_order
    n = block * BM + tl.arange(0, BM)
    c = column * BN + tl.arange(0, BN)
    n_in, c_in = n < N, c < C
    total = tl.zeros([BM, BN], dtype=tl.float32)
    for start in tl.range(first, end, BK):
        row = start + tl.arange(0, BK)
        real = row < end
        at = outs + row_of(order, row, real, K, GATHER_OUTS)[:, None] * OUTS + (FROM + n)[None, :]
        a = tl.load(at, mask=real[:, None] & n_in[None, :], other=0.0)
        at = ins + row_of(order, row, real, K, GATHER_INS)[:, None] * INS + c[None, :]
        b = tl.load(at, mask=real[:, None] & c_in[None, :], other=0.0)
        total = dot(tl.trans(a), b, total, PRECISION)
    at = expert_base(dw, e, W_E, LISTED, W_DTYPE) + n[:, None] * W_N + c[None, :] * W_C
    tl.store(at, total.to(W_DTYPE), mask=n_in[:, None] & c_in[None, :])


@triton.jit(do_not_specialize=["at_order"], do_not_specialize_on_alignment=["weights", "db"])
def bias_gradient(outs, weights, meta, db, at_order,
                  K: tl.constexpr, N: tl.constexpr, OUTS: tl.constexpr, FROM: tl.constexpr, GATHER: tl.constexpr,
                  WEIGHTED: tl.constexpr, B_E: tl.constexpr, B_N: tl.constexpr, B_LISTED: tl.constexpr,
                  B_DTYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """outs[.., OUTS] from column FROM on -> db[E, N], the sum of each expert's rows, times the pairs' weights if
    WEIGHTED. Grid: (N / BN, E)."""
    e = tl.program_id(1)
    first, end = tl.load(meta + 4 + e), tl.load(meta + 5 + e)
    order = meta + at_order
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros([BN], dtype=tl.float32)
    for start in tl.range(first, end, BK):
        row = start + tl.arange(0, BK)
        real = row < end
        at = outs + row_of(order, row, real, K, GATHER)[:, None] * OUTS + (FROM + n)[None, :]
        found = tl.load(at, mask=real[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            pair = tl.load(order + row, mask=real, other=0)
            found *= tl.load(weights + pair, mask=real, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(found, axis=0)
    tl.store(vector_base(db, e, B_E, B_LISTED, B_DTYPE) + n * B_N, total.to(B_DTYPE), mask=n < N)
