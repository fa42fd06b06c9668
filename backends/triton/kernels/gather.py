"""Tokens' rows copied into the order of their experts, for products that read them by TMA.

T tokens, K experts per token, P = T * K pairs, E experts, D model width. `meta` as in group.py.
"""

# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit(do_not_specialize=["most"])
def gather_rows(x, meta, rows, most, K: tl.constexpr, E: tl.constexpr, D: tl.constexpr, AT: tl.constexpr,
                BR: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """x[T, D] -> rows[P, D]: row r is that of the token of pair order[r]. Grid: (D / BD, P / BR)."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    row = tl.program_id(1) * BR + tl.arange(0, BR)
    column = tl.program_id(0) * BD + tl.arange(0, BD)
    real = row < tl.load(meta + 4 + E)
    pair = tl.load(meta + AT + 2 * most + row, mask=real, other=0)
    inside = real[:, None] & (column < D)[None, :]
    found = tl.load(x + (pair // K).to(tl.int64)[:, None] * D + column[None, :], mask=inside, other=0.0)
    tl.store(rows + row.to(tl.int64)[:, None] * D + column[None, :], found, mask=inside)
