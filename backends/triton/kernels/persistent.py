"""Both products with one program per multiprocessor, weights by TMA: for many rows per expert, on Hopper and later.

P pairs (token * K + choice), E experts, D model width, F expert width, O output width. `meta` as in group.py. Weights
are descriptors over [E, N, C], or [E, C, N] with TURNED, whose blocks reach past an edge as zeros; with LISTED tables
of addresses.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra import cuda

from moec.backends.triton.kernels.activation import activate
from moec.backends.triton.kernels.address import dot
from moec.backends.triton.kernels.tiles import epilogue_vector, place_of


@triton.jit
def matrix_of(weights, e, N: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, BN: tl.constexpr,
              BK: tl.constexpr, TURNED: tl.constexpr, LISTED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """What `load_block` reads expert e's matrix by: the descriptor of all, or with LISTED one made of its address."""
    if LISTED:
        at = tl.multiple_of(tl.load(weights + e).to(tl.pointer_type(DTYPE)), 16)
        if TURNED:
            found = tl.make_tensor_descriptor(at, [C, N], [STRIDE, 1], [BK, BN])
        else:
            found = tl.make_tensor_descriptor(at, [N, C], [STRIDE, 1], [BN, BK])
    else:
        found = weights
    return found


@triton.jit
def matrices_of(weights, e, N: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, GAP: tl.constexpr,
                BN: tl.constexpr, BK: tl.constexpr, LISTED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """What `load_both` reads expert e's two matrices by, the second GAP elements behind the first."""
    if LISTED:
        at = tl.multiple_of(tl.load(weights + e).to(tl.pointer_type(DTYPE)), 16)
        found = tl.make_tensor_descriptor(at, [2, N, C], [GAP, STRIDE, 1], [2, BN, BK])
    else:
        found = weights
    return found


@triton.jit
def load_both(matrices, e, n, c, BN: tl.constexpr, BK: tl.constexpr, LISTED: tl.constexpr):
    """The blocks of both of expert e's matrices from output n and input c on, [BK, 2 * BN]."""
    block = matrices.load([0, n, c]) if LISTED else matrices.load([e, 0, n, c])
    return block.reshape(2 * BN, BK).T


@triton.jit
def load_block(matrix, e, n, c, BN: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr, LISTED: tl.constexpr):
    """The block of expert e's matrix from output n and input c on, [BK, BN]."""
    if LISTED:
        block = matrix.load([c, n]) if TURNED else matrix.load([n, c]).T
    elif TURNED:
        block = matrix.load([e, c, n]).reshape(BK, BN)
    else:
        block = matrix.load([e, n, c]).reshape(BN, BK).T
    return block


@triton.jit
def load_rows(at, real, inside, EVEN: tl.constexpr):
    """A step's inputs of a tile's rows, [BM, BK]; `inside` says which inputs there are where they are not EVEN."""
    mask = real[:, None]
    if not EVEN:
        mask = mask & inside[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["most"])
def persistent_in(
                  x, meta, gate, up, b_gate, b_up, h, most,
                  K: tl.constexpr, E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, AT: tl.constexpr,
                  TURNED: tl.constexpr, JOINT: tl.constexpr, SWAPPED: tl.constexpr,
                  LISTED: tl.constexpr, W_DTYPE: tl.constexpr, STRIDE: tl.constexpr, GAP: tl.constexpr,
                  B_E: tl.constexpr, B_N: tl.constexpr, B_LISTED: tl.constexpr,
                  B_DTYPE: tl.constexpr, FN: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
                  AFTER: tl.constexpr, SHIFT: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
                  PRECISION: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
                  FLATTEN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """x[T, D] -> h[P, F] in the order of `meta`: gate, up and activation. Grid: PROGRAMS.

    With JOINT `gate` is one descriptor over [E, 2, F, D] of both (SWAPPED: up first), or the table of the first ones:
    one load and one product, twice as wide, do for both. `up` is then not read.
    """
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    tiles = tl.load(meta)
    COLUMNS: tl.constexpr = (F + BN - 1) // BN
    c = tl.arange(0, BK)
    # The loop over tiles itself must not be pipelined where it makes descriptors, which cannot be put off.
    STAGES: tl.constexpr = 1 if LISTED else None
    for place in tl.range(tl.program_id(0), tiles * COLUMNS, PROGRAMS, num_stages=STAGES, flatten=FLATTEN):
        tile, block = place_of(place, tiles, COLUMNS, GROUP)
        e = tl.load(meta + AT + tile)
        row = tl.load(meta + AT + most + tile) + tl.arange(0, BM)
        real = row < tl.load(meta + 5 + e)
        pair = tl.load(meta + AT + 2 * most + row, mask=real, other=0)
        x_at = x + (pair // K).to(tl.int64)[:, None] * D + c[None, :]
        first = block * BN
        if JOINT:
            both_of = matrices_of(gate, e, F, D, STRIDE, GAP, BN, BK, LISTED, W_DTYPE)
            both = tl.zeros([BM, 2 * BN], dtype=tl.float32)
            for start in tl.range(0, D, BK):
                a = load_rows(x_at + start, real, c < D - start, D % BK == 0)
                both = dot(a, load_both(both_of, e, first, start, BN, BK, LISTED), both, PRECISION)
            g, u = both.reshape(BM, 2, BN).permute(0, 2, 1).split()
            if SWAPPED:
                g, u = u, g
        else:
            gate_of = matrix_of(gate, e, F, D, STRIDE, BN, BK, TURNED, LISTED, W_DTYPE)
            up_of = gate_of
            if GATED:
                up_of = matrix_of(up, e, F, D, STRIDE, BN, BK, TURNED, LISTED, W_DTYPE)
            g = tl.zeros([BM, BN], dtype=tl.float32)
            u = tl.zeros([BM, BN], dtype=tl.float32)
            for start in tl.range(0, D, BK):
                a = load_rows(x_at + start, real, c < D - start, D % BK == 0)
                g = dot(a, load_block(gate_of, e, first, start, BN, BK, TURNED, LISTED), g, PRECISION)
                if GATED:
                    u = dot(a, load_block(up_of, e, first, start, BN, BK, TURNED, LISTED), u, PRECISION)
        columns = first + tl.arange(0, BN)
        inside = columns < F
        g = epilogue_vector(g, b_gate, None, e, columns, inside, B_E, B_N, B_LISTED, B_DTYPE,
                            0, 0, False, None, HAS_BIAS, False)  # fmt: skip
        if GATED:
            u = epilogue_vector(u, b_up, None, e, columns, inside, B_E, B_N, B_LISTED, B_DTYPE,
                                0, 0, False, None, HAS_BIAS, False)  # fmt: skip
        act = activate(g, u, FN, ALPHA, LIMIT, AFTER, SHIFT, GATED)
        at = h + row.to(tl.int64)[:, None] * F + columns[None, :]
        tl.store(at, act.to(h.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["most"], do_not_specialize_on_alignment=["weights"])
def persistent_out(h, meta, weights, down, bias, y, most,
                   E: tl.constexpr, F: tl.constexpr, O: tl.constexpr, AT: tl.constexpr,  # noqa: E741
                   TURNED: tl.constexpr, LISTED: tl.constexpr, W_DTYPE: tl.constexpr, STRIDE: tl.constexpr,
                   B_E: tl.constexpr, B_N: tl.constexpr, B_LISTED: tl.constexpr, B_DTYPE: tl.constexpr,
                   HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
                   FLATTEN: tl.constexpr, BY_TMA: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """h[P, F] -> y[P, O] in the order of pairs, times the pairs' weights. Grid: PROGRAMS.

    With BY_TMA h is a descriptor; a tile's last rows may then be the next expert's, which are not stored.
    """
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    tiles = tl.load(meta)
    COLUMNS: tl.constexpr = (O + BN - 1) // BN
    c = tl.arange(0, BK)
    STAGES: tl.constexpr = 1 if LISTED else None  # as above
    for place in tl.range(tl.program_id(0), tiles * COLUMNS, PROGRAMS, num_stages=STAGES, flatten=FLATTEN):
        tile, block = place_of(place, tiles, COLUMNS, GROUP)
        e = tl.load(meta + AT + tile)
        first = tl.load(meta + AT + most + tile)
        row = first + tl.arange(0, BM)
        real = row < tl.load(meta + 5 + e)
        matrix = matrix_of(down, e, O, F, STRIDE, BN, BK, TURNED, LISTED, W_DTYPE)
        total = tl.zeros([BM, BN], dtype=tl.float32)
        for start in tl.range(0, F, BK):
            if BY_TMA:
                a = h.load([first, start])
            else:
                h_at = h + row.to(tl.int64)[:, None] * F + (start + c)[None, :]
                a = tl.load(h_at, mask=real[:, None] & (c < F - start)[None, :], other=0.0)
            w = load_block(matrix, e, block * BN, start, BN, BK, TURNED, LISTED)
            total = dot(a, w, total, PRECISION)
        columns = block * BN + tl.arange(0, BN)
        inside = columns < O
        total = epilogue_vector(total, bias, None, e, columns, inside, B_E, B_N, B_LISTED, B_DTYPE,
                                0, 0, False, None, HAS_BIAS, False)  # fmt: skip
        pair = tl.load(meta + AT + 2 * most + row, mask=real, other=0)
        if WEIGHTED:
            total *= tl.load(weights + pair, mask=real, other=0.0).to(tl.float32)[:, None]
        at = y + pair.to(tl.int64)[:, None] * O + columns[None, :]
        tl.store(at, total.to(y.dtype.element_ty), mask=real[:, None] & inside[None, :])
