"""One row at a time: for few tokens, whose pairs seldom share an expert. Two launches, no sorting.

T tokens, K experts per token, P = T * K pairs, E experts, D model width, F expert width, O output width.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra import cuda

from moec.backends.triton.kernels.activation import activate
from moec.backends.triton.kernels.address import expert_base, load_expert, valid_tokens, vector_base


@triton.jit
def row_products(row, base, columns, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
                 BN: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """row[INPUTS] times the matrix at `base`, columns[BN] of its outputs -> f32[BN]."""
    total = tl.zeros([BN, BC], dtype=tl.float32)
    for start in tl.range(0, INPUTS, BC):
        c = start + tl.arange(0, BC)
        inside = c < INPUTS
        w = tl.load(base + columns[:, None] * N + c[None, :] * C,
                    mask=(columns[:, None] < COLUMNS) & inside[None, :], other=0.0)  # fmt: skip
        x = tl.load(row + c, mask=inside, other=0.0)
        total += w.to(tl.float32) * x.to(tl.float32)[None, :]
    return tl.sum(total, axis=1)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["ids", "valid"])
def gemv_in(x, ids, valid, gate, up, b_gate, b_up, s_gate, s_up, h, tokens,
            K: tl.constexpr, E: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
            W_E: tl.constexpr, W_N: tl.constexpr, W_C: tl.constexpr, LISTED: tl.constexpr, W_DTYPE: tl.constexpr,
            B_E: tl.constexpr, B_N: tl.constexpr, B_LISTED: tl.constexpr, B_DTYPE: tl.constexpr,
            S_E: tl.constexpr, S_N: tl.constexpr, S_LISTED: tl.constexpr, S_DTYPE: tl.constexpr,
            FN: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, AFTER: tl.constexpr, SHIFT: tl.constexpr,
            GATED: tl.constexpr, HAS_VALID: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
            BN: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """x[T, D], ids[T, K] -> h[P, F]: gate, up and activation of each pair's expert. Grid: (F / BN, P).

    Pairs without an expert leave their row of h as it was; `gemv_out` does not read it.
    """
    if PDL:
        cuda.gdc_launch_dependents()
    pair = tl.program_id(1)
    e = load_expert(ids, pair, valid_tokens(valid, tokens, HAS_VALID) * K, E)
    if e < E:
        columns = tl.program_id(0) * BN + tl.arange(0, BN)
        inside = columns < F
        row = x + (pair // K).to(tl.int64) * D
        g = row_products(row, expert_base(gate, e, W_E, LISTED, W_DTYPE), columns, F, D, W_N, W_C, BN, BC)
        u = g
        if GATED:
            u = row_products(row, expert_base(up, e, W_E, LISTED, W_DTYPE), columns, F, D, W_N, W_C, BN, BC)
        if HAS_SCALE:
            g *= tl.load(vector_base(s_gate, e, S_E, S_LISTED, S_DTYPE) + columns * S_N, mask=inside, other=0.0)
            if GATED:
                u *= tl.load(vector_base(s_up, e, S_E, S_LISTED, S_DTYPE) + columns * S_N, mask=inside, other=0.0)
        if HAS_BIAS:
            at = vector_base(b_gate, e, B_E, B_LISTED, B_DTYPE) + columns * B_N
            g += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if GATED:
                at = vector_base(b_up, e, B_E, B_LISTED, B_DTYPE) + columns * B_N
                u += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        a = activate(g, u, FN, ALPHA, LIMIT, AFTER, SHIFT, GATED)
        tl.store(h + pair.to(tl.int64) * F + columns, a.to(h.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["ids", "valid", "weights"])
def gemv_out(h, ids, weights, valid, down, bias, scale, out, tokens,
             K: tl.constexpr, E: tl.constexpr, F: tl.constexpr, O: tl.constexpr,  # noqa: E741
             W_E: tl.constexpr, W_N: tl.constexpr, W_C: tl.constexpr, LISTED: tl.constexpr, W_DTYPE: tl.constexpr,
             B_E: tl.constexpr, B_N: tl.constexpr, B_LISTED: tl.constexpr, B_DTYPE: tl.constexpr,
             S_E: tl.constexpr, S_N: tl.constexpr, S_LISTED: tl.constexpr, S_DTYPE: tl.constexpr,
             HAS_VALID: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, WEIGHTED: tl.constexpr,
             BN: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """h[P, F], ids[T, K], weights[T, K] -> out[T, O]: each token's weighted sum over its experts. Grid: (O / BN, T).

    One loop over the chunks of all K experts, each chunk's weights loaded one step ahead: the first ones before
    the wait for h.
    """
    token = tl.program_id(1)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = columns < O
    limit = valid_tokens(valid, tokens, HAS_VALID) * K
    STEPS: tl.constexpr = (F + BC - 1) // BC
    total = tl.zeros([BN, BC], dtype=tl.float32)
    lane = tl.arange(0, BC)
    e = load_expert(ids, token * K, limit, E)
    # No expert has no inputs: its weights and its row of h are not read.
    width = tl.where(e < E, F, 0)
    base = expert_base(down, tl.where(e < E, e, 0), W_E, LISTED, W_DTYPE)
    w = tl.load(base + columns[:, None] * W_N + lane[None, :] * W_C,
                mask=inside[:, None] & (lane < width)[None, :], other=0.0)  # fmt: skip
    if PDL:
        cuda.gdc_wait()
    for step in tl.range(0, K * STEPS):
        pair = token * K + step // STEPS
        c = (step % STEPS) * BC + lane
        row = tl.load(h + pair.to(tl.int64) * F + c, mask=c < width, other=0.0).to(tl.float32)
        weight = 1.0
        if WEIGHTED:
            weight = tl.load(weights + pair).to(tl.float32)
        weight = tl.where(e < E, weight, 0.0)
        if HAS_SCALE:
            at = vector_base(scale, tl.where(e < E, e, 0), S_E, S_LISTED, S_DTYPE) + columns * S_N
            by = tl.load(at, mask=inside, other=0.0) * weight
            total += w.to(tl.float32) * row[None, :] * by[:, None]
        else:
            total += w.to(tl.float32) * (row * weight)[None, :]
        after = step + 1
        e = load_expert(ids, token * K + after // STEPS, tl.minimum(limit, (token + 1) * K), E)
        width = tl.where(e < E, F, 0)
        base = expert_base(down, tl.where(e < E, e, 0), W_E, LISTED, W_DTYPE)
        c = (after % STEPS) * BC + lane
        w = tl.load(base + columns[:, None] * W_N + c[None, :] * W_C,
                    mask=inside[:, None] & (c < width)[None, :], other=0.0)  # fmt: skip
    y = tl.sum(total, axis=1)
    if HAS_BIAS:
        for k in tl.range(0, K):
            e = load_expert(ids, token * K + k, limit, E)
            at = vector_base(bias, tl.where(e < E, e, 0), B_E, B_LISTED, B_DTYPE) + columns * B_N
            weight = 1.0
            if WEIGHTED:
                weight = tl.load(weights + token * K + k).to(tl.float32)
            b = tl.load(at, mask=columns < tl.where(e < E, O, 0), other=0.0).to(tl.float32)
            y += b * tl.where(e < E, weight, 0.0)
    tl.store(out + token.to(tl.int64) * O + columns, y.to(out.dtype.element_ty), mask=inside)
