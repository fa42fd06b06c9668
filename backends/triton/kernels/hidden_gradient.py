"""Backward through the second product and the activation: gradients of gate, up and routing weights.

T tokens, K experts per token, P pairs (token * K + choice), E experts, F expert width, O output width. `meta` as in
group.py, z as in train_in.py. The gradient of a routing weight is <grad of y, expert's output>, which is
<hidden gradient, hidden values> + <grad of y, bias>: the expert's output is not needed again.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from moec.backends.triton.kernels.activation import activate
from moec.backends.triton.kernels.address import dot, expert_base, vector_base
from moec.backends.triton.kernels.derivative import activate_back
from moec.backends.triton.kernels.tiles import place_of, rows_of


@triton.jit
def through_activation(grad, weight, z, dz, wh, row, real, columns, F: tl.constexpr, WIDTH: tl.constexpr,
                       FN: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, AFTER: tl.constexpr,
                       SHIFT: tl.constexpr, GATED: tl.constexpr, HAS_WH: tl.constexpr,
                       HAS_DZ: tl.constexpr):  # fmt: skip
    """grad[BM, N] of unweighted hidden values -> dz and wh at these columns, and f32[BM], <grad, hidden values>."""
    held = real[:, None] & (columns < F)[None, :]
    at = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    g = tl.load(z + at, mask=held, other=0.0).to(tl.float32)
    u = g
    if GATED:
        u = tl.load(z + at + F, mask=held, other=0.0).to(tl.float32)
    # Past the edges some activations of 0 are not 0.
    h = tl.where(held, activate(g, u, FN, ALPHA, LIMIT, AFTER, SHIFT, GATED), 0.0)
    share = tl.sum(grad * h, axis=1)
    if HAS_WH:
        wh_at = wh + row.to(tl.int64)[:, None] * F + columns[None, :]
        tl.store(wh_at, (h * weight[:, None]).to(wh.dtype.element_ty), mask=held)
    if HAS_DZ:
        dg, du = activate_back(grad * weight[:, None], g, u, FN, ALPHA, LIMIT, AFTER, SHIFT, GATED)
        tl.store(dz + at, dg.to(dz.dtype.element_ty), mask=held)
        if GATED:
            tl.store(dz + at + F, du.to(dz.dtype.element_ty), mask=held)
    return share


@triton.jit(do_not_specialize=["most"], do_not_specialize_on_alignment=["weights"])
def hidden_gradient(dy, meta, weights, down, z, dz, wh, shares, most,
                    K: tl.constexpr, F: tl.constexpr, O: tl.constexpr, AT: tl.constexpr,  # noqa: E741
                    W_E: tl.constexpr, W_N: tl.constexpr, W_C: tl.constexpr, LISTED: tl.constexpr,
                    W_DTYPE: tl.constexpr, FN: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
                    AFTER: tl.constexpr, SHIFT: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr,
                    HAS_SHARES: tl.constexpr, HAS_WH: tl.constexpr, HAS_DZ: tl.constexpr, PRECISION: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """dy[T, O] -> dz like z, whose memory it may have; wh[P, F], hidden values times the pair's weight; shares
    f32[P, F / BN] of the gradients of routing weights. Grid: tiles * (F / BN)."""
    tiles = tl.load(meta)
    COLUMNS: tl.constexpr = (F + BN - 1) // BN
    WIDTH: tl.constexpr = 2 * F if GATED else F
    if tl.program_id(0) < tiles * COLUMNS:
        tile, block = place_of(tl.program_id(0), tiles, COLUMNS, GROUP)
        e, row, real = rows_of(meta, tile, most, AT, BM)
        pair = tl.load(meta + AT + 2 * most + row, mask=real, other=0)
        columns = block * BN + tl.arange(0, BN)
        inside = columns < F
        o = tl.arange(0, BK)
        dy_at = dy + (pair // K).to(tl.int64)[:, None] * O + o[None, :]
        w_at = expert_base(down, e, W_E, LISTED, W_DTYPE) + columns[None, :] * W_C + o[:, None] * W_N
        grad = tl.zeros([BM, BN], dtype=tl.float32)
        for start in tl.range(0, O, BK):
            a_in, w_in = real[:, None], inside[None, :]
            if O % BK != 0:
                a_in, w_in = a_in & (o < O - start)[None, :], w_in & (o < O - start)[:, None]
            a = tl.load(dy_at, mask=a_in, other=0.0)
            grad = dot(a, tl.load(w_at, mask=w_in, other=0.0), grad, PRECISION)
            dy_at += BK
            w_at += BK * W_N
        weight = real.to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights + pair, mask=real, other=0.0).to(tl.float32)
        # By halves: what the activation takes of registers comes on top of the sums.
        one, two = grad.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        c = tl.arange(0, BN // 2)
        first = block * BN
        share = through_activation(one, weight, z, dz, wh, row, real, first + c, F, WIDTH, FN, ALPHA, LIMIT, AFTER,
                                   SHIFT, GATED, HAS_WH, HAS_DZ)  # fmt: skip
        share += through_activation(two, weight, z, dz, wh, row, real, first + BN // 2 + c, F, WIDTH, FN, ALPHA, LIMIT,
                                    AFTER, SHIFT, GATED, HAS_WH, HAS_DZ)  # fmt: skip
        if HAS_SHARES:
            tl.store(shares + row.to(tl.int64) * COLUMNS + block, share, mask=real)


@triton.jit(do_not_specialize=["most"])
def weight_sums(shares, dy, meta, bias, dw, most,
                K: tl.constexpr, O: tl.constexpr, AT: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: E741
                B_E: tl.constexpr, B_N: tl.constexpr, B_LISTED: tl.constexpr, B_DTYPE: tl.constexpr,
                HAS_BIAS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr):  # fmt: skip
    """shares f32[P, COLUMNS], dy[T, O] -> dw[T, K] for pairs that have an expert, in a fixed order. Grid: tiles."""
    tile = tl.program_id(0)
    if tile < tl.load(meta):
        e, row, real = rows_of(meta, tile, most, AT, BM)
        pair = tl.load(meta + AT + 2 * most + row, mask=real, other=0)
        total = tl.zeros([BM], dtype=tl.float32)
        for start in tl.range(0, COLUMNS, BC):
            c = start + tl.arange(0, BC)
            at = shares + row.to(tl.int64)[:, None] * COLUMNS + c[None, :]
            total += tl.sum(tl.load(at, mask=real[:, None] & (c < COLUMNS)[None, :], other=0.0), axis=1)
        if HAS_BIAS:
            b_at = vector_base(bias, e, B_E, B_LISTED, B_DTYPE)
            for start in tl.range(0, O, BO):
                o = start + tl.arange(0, BO)
                b = tl.load(b_at + o * B_N, mask=o < O, other=0.0).to(tl.float32)
                at = dy + (pair // K).to(tl.int64)[:, None] * O + o[None, :]
                found = tl.load(at, mask=real[:, None] & (o < O)[None, :], other=0.0).to(tl.float32)
                total += tl.sum(found * b[None, :], axis=1)
        tl.store(dw + pair, total.to(dw.dtype.element_ty), mask=real)
