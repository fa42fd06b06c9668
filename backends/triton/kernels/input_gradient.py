"""Backward through the first product: gradients of the experts' inputs.

P pairs (token * K + choice), E experts, D model width, F expert width. `meta` as in group.py, dz as in train_in.py's z.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from moec.backends.triton.kernels.address import dot, expert_base
from moec.backends.triton.kernels.tiles import place_of, rows_of


@triton.jit
def add_product(total, rows, weights, real, inside, F: tl.constexpr, W_N: tl.constexpr, PRECISION: tl.constexpr,
                BK: tl.constexpr):  # fmt: skip
    """total[BM, BN] + rows[BM, F] @ weights[F, BN]: both are addresses of the first step's elements."""
    f = tl.arange(0, BK)
    for start in tl.range(0, F, BK):
        a_in, w_in = real[:, None], inside[None, :]
        if F % BK != 0:
            a_in, w_in = a_in & (f < F - start)[None, :], w_in & (f < F - start)[:, None]
        a = tl.load(rows, mask=a_in, other=0.0)
        total = dot(a, tl.load(weights, mask=w_in, other=0.0), total, PRECISION)
        rows += BK
        weights += BK * W_N
    return total


@triton.jit(do_not_specialize=["most"])
def input_gradient(dz, meta, gate, up, dx, most,
                   D: tl.constexpr, F: tl.constexpr, AT: tl.constexpr,
                   W_E: tl.constexpr, W_N: tl.constexpr, W_C: tl.constexpr, LISTED: tl.constexpr,
                   W_DTYPE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """dz -> dx[P, D] in the order of pairs. Grid: tiles * (D / BN)."""
    tiles = tl.load(meta)
    COLUMNS: tl.constexpr = (D + BN - 1) // BN
    WIDTH: tl.constexpr = 2 * F if GATED else F
    if tl.program_id(0) < tiles * COLUMNS:
        tile, block = place_of(tl.program_id(0), tiles, COLUMNS, GROUP)
        e, row, real = rows_of(meta, tile, most, AT, BM)
        columns = block * BN + tl.arange(0, BN)
        inside = columns < D
        f = tl.arange(0, BK)
        rows = dz + row.to(tl.int64)[:, None] * WIDTH + f[None, :]
        w_at = columns[None, :] * W_C + f[:, None] * W_N
        total = tl.zeros([BM, BN], dtype=tl.float32)
        at = expert_base(gate, e, W_E, LISTED, W_DTYPE) + w_at
        total = add_product(total, rows, at, real, inside, F, W_N, PRECISION, BK)
        if GATED:
            at = expert_base(up, e, W_E, LISTED, W_DTYPE) + w_at
            total = add_product(total, rows + F, at, real, inside, F, W_N, PRECISION, BK)
        pair = tl.load(meta + AT + 2 * most + row, mask=real, other=0)
        at = dx + pair.to(tl.int64)[:, None] * D + columns[None, :]
        tl.store(at, total.to(dx.dtype.element_ty), mask=real[:, None] & inside[None, :])
