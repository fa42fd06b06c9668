"""The first product when gradients are recorded: gate and up are kept beside what the activation makes of them.

P pairs (token * K + choice), E experts, D model width, F expert width. `meta` as in group.py. z[P, F], or z[P, 2F]
where gated: gate, then up, in x's element type and in the order of `meta`.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from moec.backends.triton.kernels.activation import activate
from moec.backends.triton.kernels.address import dot, expert_base, vector_base
from moec.backends.triton.kernels.tiles import place_of, rows_of


@triton.jit
def add_bias(value, bias, e, columns, inside, B_E: tl.constexpr, B_N: tl.constexpr, B_LISTED: tl.constexpr,
             B_DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """value[BM, BN] plus expert e's bias."""
    if HAS_BIAS:
        at = vector_base(bias, e, B_E, B_LISTED, B_DTYPE) + columns * B_N
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit(do_not_specialize=["most"])
def train_in(x, meta, gate, up, b_gate, b_up, z, h, most,
             K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, AT: tl.constexpr,
             W_E: tl.constexpr, W_N: tl.constexpr, W_C: tl.constexpr, LISTED: tl.constexpr, W_DTYPE: tl.constexpr,
             B_E: tl.constexpr, B_N: tl.constexpr, B_LISTED: tl.constexpr, B_DTYPE: tl.constexpr,
             FN: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, AFTER: tl.constexpr, SHIFT: tl.constexpr,
             GATED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """x[T, D] -> z and h[P, F] in the order of `meta`. Grid: tiles * (F / BN)."""
    tiles = tl.load(meta)
    COLUMNS: tl.constexpr = (F + BN - 1) // BN
    WIDTH: tl.constexpr = 2 * F if GATED else F
    if tl.program_id(0) < tiles * COLUMNS:
        tile, block = place_of(tl.program_id(0), tiles, COLUMNS, GROUP)
        e, row, real = rows_of(meta, tile, most, AT, BM)
        pair = tl.load(meta + AT + 2 * most + row, mask=real, other=0)
        columns = block * BN + tl.arange(0, BN)
        inside = columns < F
        c = tl.arange(0, BK)
        x_at = x + (pair // K).to(tl.int64)[:, None] * D + c[None, :]
        w_at = columns[None, :] * W_N + c[:, None] * W_C
        gate_at = expert_base(gate, e, W_E, LISTED, W_DTYPE) + w_at
        up_at = gate_at
        if GATED:
            up_at = expert_base(up, e, W_E, LISTED, W_DTYPE) + w_at
        g = tl.zeros([BM, BN], dtype=tl.float32)
        u = tl.zeros([BM, BN], dtype=tl.float32)
        for start in tl.range(0, D, BK):
            a_in, w_in = real[:, None], inside[None, :]
            if D % BK != 0:
                a_in, w_in = a_in & (c < D - start)[None, :], w_in & (c < D - start)[:, None]
            a = tl.load(x_at, mask=a_in, other=0.0)
            g = dot(a, tl.load(gate_at, mask=w_in, other=0.0), g, PRECISION)
            if GATED:
                u = dot(a, tl.load(up_at, mask=w_in, other=0.0), u, PRECISION)
                up_at += BK * W_C
            x_at += BK
            gate_at += BK * W_C
        g = add_bias(g, b_gate, e, columns, inside, B_E, B_N, B_LISTED, B_DTYPE, HAS_BIAS)
        held = real[:, None] & inside[None, :]
        at = z + row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        tl.store(at, g.to(z.dtype.element_ty), mask=held)
        if GATED:
            u = add_bias(u, b_up, e, columns, inside, B_E, B_N, B_LISTED, B_DTYPE, HAS_BIAS)
            tl.store(at + F, u.to(z.dtype.element_ty), mask=held)
        act = activate(g, u, FN, ALPHA, LIMIT, AFTER, SHIFT, GATED)
        tl.store(h + row.to(tl.int64)[:, None] * F + columns[None, :], act.to(h.dtype.element_ty), mask=held)
