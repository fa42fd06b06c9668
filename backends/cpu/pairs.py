"""Two experts at a time: the way for few rows of small experts in fp32, whose single products use one core only.

Any two experts a < b of one tensor are a view of it, w[a : b+1 : b-a], so a batched product takes them without a copy.
S slots that have an expert, H hit experts, N rows with padding, D model width, F expert width, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moec.backends.cpu.operands import Layer, Product, bias_rows
from moec.backends.cpu.scratch import scratch
from moec.backends.cpu.slots import Ints, Slots
from moec.backends.cpu.sums import combine

# Up to this many rows of an expert, BLAS libraries are fastest with the weights on the left.
FEW_ROWS = 4


@dataclass(frozen=True, slots=True)
class Pair:
    """Experts first and first+step (one if count is 1), with `rows` rows each from row `start` on."""

    first: int
    step: int
    count: int
    start: int
    rows: int


def pair_up(slots: Slots) -> tuple[list[Pair], Ints, int]:
    """Pairs of experts with similar numbers of rows; places[S], the row of each slot; and N."""
    by_count = np.argsort(slots.counts, kind="stable")
    base = np.empty(by_count.size, np.int64)
    pairs: list[Pair] = []
    num_rows = 0
    ranks, experts, counts = by_count.tolist(), slots.hit.tolist(), slots.counts.tolist()
    for i in range(0, len(ranks), 2):
        pair = sorted(ranks[i : i + 2])
        rows = max(counts[rank] for rank in pair)
        low, high = experts[pair[0]], experts[pair[-1]]
        pairs.append(Pair(low, max(high - low, 1), len(pair), num_rows, rows))
        for rank in pair:
            base[rank] = num_rows
            num_rows += rows
    within = np.arange(slots.num_slots) - np.repeat(slots.starts, slots.counts)
    return pairs, np.repeat(base, slots.counts) + within, num_rows


def run_pairs(layer: Layer, x: torch.Tensor, slots: Slots, weights: torch.Tensor) -> torch.Tensor:
    """x[T, D], slots of T tokens, weights[T, K] -> [T, O]; 16-bit weights are widened to fp32, a pair at a time."""
    dtype = torch.float32 if x.itemsize == 2 else x.dtype
    pairs, places, num_rows = pair_up(slots)
    source = np.zeros(num_rows, np.int64)
    source[places] = slots.tokens
    rows = x.index_select(0, torch.from_numpy(source)).to(dtype)
    h = _product(layer.first, rows, pairs, "first")
    up = None if layer.up is None else _product(layer.up, rows, pairs, "up")
    a = layer.activation(h, up, scratch("a", (num_rows, layer.width), dtype))
    return combine(_product(layer.second, a, pairs, "y"), places, slots, weights).to(x.dtype)


def _product(product: Product, x: torch.Tensor, pairs: list[Pair], name: str) -> torch.Tensor:
    """x[N, C] -> [N, outputs]: each pair's rows by its two matrices."""
    w = product.matrices
    num_rows, inputs = x.shape
    outputs = w.shape[1]
    y = scratch(name, (num_rows, outputs), x.dtype)
    step, row, column = w.stride()
    at_w, at_x, at_y = w.storage_offset(), x.storage_offset(), y.storage_offset()
    for pair in pairs:
        n, m = pair.count, pair.rows
        # One as_strided instead of several views: this loop is as long as the list of hit experts.
        left = w.as_strided((n, outputs, inputs), (pair.step * step, row, column), at_w + pair.first * step)
        if w.dtype != x.dtype:
            left = _widened(left, x.dtype)
        right = x.as_strided((n, inputs, m), (m * inputs, 1, inputs), at_x + pair.start * inputs)
        where = at_y + pair.start * outputs
        if m == 1:
            torch.bmm(left, right, out=y.as_strided((n, outputs, 1), (outputs, 1, 1), where))
        elif m <= FEW_ROWS:
            y.as_strided((n, outputs, m), (m * outputs, 1, outputs), where).copy_(torch.bmm(left, right))
        else:
            out = y.as_strided((n, m, outputs), (m * outputs, outputs, 1), where)
            torch.bmm(right.transpose(1, 2), left.transpose(1, 2), out=out)
    if product.b is not None:
        experts = [pair.first + i * pair.step for pair in pairs for i in range(pair.count)]
        counts = [pair.rows for pair in pairs for _ in range(pair.count)]
        y += bias_rows(product.b, experts, counts, y.dtype)
    return y


def _widened(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """w[n, N, C] in another dtype, in memory that stays in the cache, lying as w lies."""
    if w.stride(1) == 1 and w.stride(2) != 1:
        return _widened(w.transpose(1, 2), dtype).transpose(1, 2)
    return scratch("matrices", tuple(w.shape), dtype).copy_(w)
