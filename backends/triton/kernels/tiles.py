"""Both products over tiles of rows that share an expert, with plain loads: any GPU, any layout, few rows a tile.

P pairs (token * K + choice), E experts, D model width, F expert width, O output width. `meta` as in group.py.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra import cuda

from moec.backends.triton.kernels.activation import activate
from moec.backends.triton.kernels.address import dot, expert_base, vector_base


@triton.jit
def place_of(program, tiles, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Program -> (tile, block of columns): GROUP tiles go through all columns together, so that L2 holds both sides."""
    span = GROUP * COLUMNS
    first = (program // span) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    return first + (program % span) % size, (program % span) // size


@triton.jit
def rows_of(meta, tile, most, AT: tl.constexpr, BM: tl.constexpr):
    """Tile -> its expert, its rows [BM] in the order of `meta`, and which of them the expert has."""
    e = tl.load(meta + AT + tile)
    row = tl.load(meta + AT + most + tile) + tl.arange(0, BM)
    return e, row, row < tl.load(meta + 5 + e)


@triton.jit
def epilogue_vector(value, bias, scale, e, columns, inside,
                    B_E: tl.constexpr, B_N: tl.constexpr, B_LISTED: tl.constexpr, B_DTYPE: tl.constexpr,
                    S_E: tl.constexpr, S_N: tl.constexpr, S_LISTED: tl.constexpr, S_DTYPE: tl.constexpr,
                    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr):  # fmt: skip
    """value[BM, BN] times the columns' scales plus their bias."""
    if HAS_SCALE:
        at = vector_base(scale, e, S_E, S_LISTED, S_DTYPE) + columns * S_N
        value *= tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        at = vector_base(bias, e, B_E, B_LISTED, B_DTYPE) + columns * B_N
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit(do_not_specialize=["most"])
def tiles_in(x, meta, gate, up, b_gate, b_up, s_gate, s_up, h, most,
             K: tl.constexpr, E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, AT: tl.constexpr,
             W_E: tl.constexpr, W_N: tl.constexpr, W_C: tl.constexpr, LISTED: tl.constexpr, W_DTYPE: tl.constexpr,
             B_E: tl.constexpr, B_N: tl.constexpr, B_LISTED: tl.constexpr, B_DTYPE: tl.constexpr,
             S_E: tl.constexpr, S_N: tl.constexpr, S_LISTED: tl.constexpr, S_DTYPE: tl.constexpr,
             FN: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, AFTER: tl.constexpr, SHIFT: tl.constexpr,
             GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, PRECISION: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """x[T, D] -> h[P, F] in the order of `meta`: gate, up and activation. Grid: tiles * (F / BN)."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    tiles = tl.load(meta)
    COLUMNS: tl.constexpr = (F + BN - 1) // BN
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
            left = D - start
            if D % BK == 0:
                a = tl.load(x_at, mask=real[:, None], other=0.0)
                w = tl.load(gate_at, mask=inside[None, :], other=0.0)
            else:
                a = tl.load(x_at, mask=real[:, None] & (c < left)[None, :], other=0.0)
                w = tl.load(gate_at, mask=inside[None, :] & (c < left)[:, None], other=0.0)
            g = dot(a, w, g, PRECISION)
            if GATED:
                if D % BK == 0:
                    w = tl.load(up_at, mask=inside[None, :], other=0.0)
                else:
                    w = tl.load(up_at, mask=inside[None, :] & (c < left)[:, None], other=0.0)
                u = dot(a, w, u, PRECISION)
                up_at += BK * W_C
            x_at += BK
            gate_at += BK * W_C
        g = epilogue_vector(g, b_gate, s_gate, e, columns, inside, B_E, B_N, B_LISTED, B_DTYPE,
                            S_E, S_N, S_LISTED, S_DTYPE, HAS_BIAS, HAS_SCALE)  # fmt: skip
        if GATED:
            u = epilogue_vector(u, b_up, s_up, e, columns, inside, B_E, B_N, B_LISTED, B_DTYPE,
                                S_E, S_N, S_LISTED, S_DTYPE, HAS_BIAS, HAS_SCALE)  # fmt: skip
        act = activate(g, u, FN, ALPHA, LIMIT, AFTER, SHIFT, GATED)
        at = h + row.to(tl.int64)[:, None] * F + columns[None, :]
        tl.store(at, act.to(h.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["most"], do_not_specialize_on_alignment=["weights"])
def tiles_out(h, meta, weights, down, bias, scale, y, most,
              E: tl.constexpr, F: tl.constexpr, O: tl.constexpr, AT: tl.constexpr,  # noqa: E741
              W_E: tl.constexpr, W_N: tl.constexpr, W_C: tl.constexpr, LISTED: tl.constexpr, W_DTYPE: tl.constexpr,
              B_E: tl.constexpr, B_N: tl.constexpr, B_LISTED: tl.constexpr, B_DTYPE: tl.constexpr,
              S_E: tl.constexpr, S_N: tl.constexpr, S_LISTED: tl.constexpr, S_DTYPE: tl.constexpr,
              HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
              PDL: tl.constexpr):  # fmt: skip
    """h[P, F] -> y[P, O] in the order of pairs, times the pairs' weights. Grid: tiles * (O / BN)."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    tiles = tl.load(meta)
    COLUMNS: tl.constexpr = (O + BN - 1) // BN
    if tl.program_id(0) < tiles * COLUMNS:
        tile, block = place_of(tl.program_id(0), tiles, COLUMNS, GROUP)
        e, row, real = rows_of(meta, tile, most, AT, BM)
        columns = block * BN + tl.arange(0, BN)
        inside = columns < O
        c = tl.arange(0, BK)
        h_at = h + row.to(tl.int64)[:, None] * F + c[None, :]
        w_at = expert_base(down, e, W_E, LISTED, W_DTYPE) + columns[None, :] * W_N + c[:, None] * W_C
        total = tl.zeros([BM, BN], dtype=tl.float32)
        for start in tl.range(0, F, BK):
            left = F - start
            if F % BK == 0:
                a = tl.load(h_at, mask=real[:, None], other=0.0)
                w = tl.load(w_at, mask=inside[None, :], other=0.0)
            else:
                a = tl.load(h_at, mask=real[:, None] & (c < left)[None, :], other=0.0)
                w = tl.load(w_at, mask=inside[None, :] & (c < left)[:, None], other=0.0)
            total = dot(a, w, total, PRECISION)
            h_at += BK
            w_at += BK * W_C
        total = epilogue_vector(total, bias, scale, e, columns, inside, B_E, B_N, B_LISTED, B_DTYPE,
                                S_E, S_N, S_LISTED, S_DTYPE, HAS_BIAS, HAS_SCALE)  # fmt: skip
        pair = tl.load(meta + AT + 2 * most + row, mask=real, other=0)
        if WEIGHTED:
            total *= tl.load(weights + pair, mask=real, other=0.0).to(tl.float32)[:, None]
        at = y + pair.to(tl.int64)[:, None] * O + columns[None, :]
        tl.store(at, total.to(y.dtype.element_ty), mask=real[:, None] & inside[None, :])
