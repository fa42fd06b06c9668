"""Matrix products. R rows, C inputs, N outputs, E experts, G groups of a row that share a scale.

Sums are kept in fp32 (f64 for f64) and rounded once. Where weights are narrower, a block of them at a time is widened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from moec.backends.reference.dtypes import wide
from moec.backends.reference.joined import Experts, matrix_pieces, pieces_of

# Elements of a matrix that are widened at a time: large enough for a product to be worth a call, and never a
# second copy of a whole large matrix.
BLOCK = 1 << 20


def linear(
    x: torch.Tensor,
    w: Experts,
    b: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x[..., C], w[N, C], b[N]?, scale[N]?, x_scale[..., G]? -> [..., N] in `dtype` or x's own: x @ w.T + b."""
    pieces = matrix_pieces(w)
    result = x.new_empty(*x.shape[:-1], sum(map(len, pieces)), dtype=dtype or x.dtype)
    _multiply(result, x, pieces, b, scale, x_scale)
    return result


def grouped_linear(
    rows: torch.Tensor,
    offsets: torch.Tensor,
    w: Experts,
    b: Experts | None = None,
    scale: Experts | None = None,
    x_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    outputs: int,
) -> torch.Tensor:
    """rows[R, C], offsets[E+1], w[E, N, C], b[E, N]?, scale[E, N]? -> [R, N]: each expert's rows by its matrix.

    Rows from offsets[E] on come out as zeros; experts without rows are not touched.
    """
    result = rows.new_zeros(rows.shape[0], outputs, dtype=dtype or rows.dtype)
    bounds = offsets.tolist()
    for e in range(len(bounds) - 1):
        part = slice(bounds[e], bounds[e + 1])
        if part.start < part.stop:
            # A copy is aligned in memory like any other: its place among the rows does not change the order of sums.
            _multiply(
                result[part],
                rows[part].clone(),
                pieces_of(w, e),
                None if b is None else b[e],
                None if scale is None else scale[e],
                None if x_scale is None else x_scale[part],
            )
    return result


def _multiply(
    result: torch.Tensor,
    x: torch.Tensor,
    pieces: Sequence[torch.Tensor],
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
) -> None:
    """Write x @ w.T + b into result[..., N], block by block of w's rows, rounding each element once."""
    kind = wide(x)
    if x_scale is None:
        x = x.to(kind)
    for at, block in _blocks(pieces, kind):
        factors = None if scale is None else scale[at]
        extra = None if b is None else b[at].to(kind)
        if x_scale is None:
            matrix = block.to(kind)
            matrix = matrix if factors is None else matrix * factors.unsqueeze(-1)
            result[..., at] = F.linear(x, matrix, extra)
        else:
            assert factors is not None, "i8 rows come with i8 weights"
            y = _int8(x, block, x_scale) * factors
            result[..., at] = y if extra is None else y + extra


def _blocks(pieces: Sequence[torch.Tensor], kind: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Where in the outputs, and the rows of w that give them; whole pieces where nothing must be widened."""
    start = 0
    for piece in pieces:
        length = len(piece)
        step = length if piece.dtype == kind else max(1, BLOCK // max(1, piece.shape[1]))
        for first in range(0, length, max(1, step)):
            rows = piece[first : first + step]
            yield slice(start + first, start + first + len(rows)), rows
        start += length


def _int8(x: torch.Tensor, w: torch.Tensor, x_scale: torch.Tensor) -> torch.Tensor:
    """i8 times i8: the sum over groups of x_scale times the group's exact sum, in fp32."""
    groups = x_scale.shape[-1]
    # Products of i8 summed in f64 are exact, as they are in i32, and f64 products exist on every device.
    left = _parted(x.double(), groups)
    right = _parted(w.double(), groups)
    sums = torch.einsum("...gc,ngc->...gn", left, right).float()
    return (sums * x_scale.unsqueeze(-1)).sum(-2)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x[..., C] -> i8[..., C], f32[...]: symmetric over the last axis, scale = max |x| / 127 or 1, half to even."""
    x = x.float()
    most = x.abs().amax(-1)
    scale = torch.where(most == 0, torch.ones_like(most), most / 127)
    # A row with a not-a-number or an infinity has a scale that is none either; its whole numbers must only be defined.
    return (x / scale.unsqueeze(-1)).round().clamp(-127, 127).nan_to_num(0).to(torch.int8), scale


def quantize_rows(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x[..., C] -> i8[..., C], f32[..., G]: `quantize` of each of G equal parts of a row."""
    q, scale = quantize(_parted(x, groups))
    return q.flatten(-2), scale


def _parted(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[..., C] -> [..., G, C/G]."""
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
