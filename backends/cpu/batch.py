"""Many experts in one batched product: the way for small experts with a few rows each, above all in 16 bits.

Every expert's rows are padded to P. Hit experts that lie side by side are a view of the weights; scattered ones are
copied together first, which for small experts costs less than a call for each. Experts that are not hit are not read.
S slots that have an expert, H hit experts, P rows of an expert, D model width, F expert width, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from moec.backends.cpu.each import Ways, run_one
from moec.backends.cpu.operands import Layer, Product
from moec.backends.cpu.scratch import scratch
from moec.backends.cpu.slots import Ints, Slots
from moec.backends.cpu.sums import combine

# A run of side by side experts of this size is worth calls of its own; a shorter one is copied together with others.
RUN_BYTES = 3 * 2**20
# From this many rows on, weights on the left are faster in 16 bits.
MANY_ROWS = 16
# A call for one expert takes as long as this many rows in a batch.
CALL_ROWS = 32


@dataclass(frozen=True, slots=True)
class Part:
    """The hit experts of ranks start..stop-1: a run that begins at expert `first`, or scattered ones."""

    start: int
    stop: int
    first: int
    experts: torch.Tensor | None

    def matrices(self, w: torch.Tensor) -> torch.Tensor:
        """w[E, N, C] -> [n, N, C] of these experts: a view of w where they lie side by side, else a copy."""
        if self.experts is None:
            return w[self.first : self.first + self.stop - self.start]
        # Copied as it lies in memory: the innermost axis stays the innermost.
        turned = w.stride(1) == 1 and w.stride(2) != 1
        source = w.transpose(1, 2) if turned else w
        picked = scratch("matrices", (self.stop - self.start, *source.shape[1:]), w.dtype)
        torch.index_select(source, 0, self.experts, out=picked)
        return picked.transpose(1, 2) if turned else picked


def find_parts(hit: Ints, expert_bytes: int) -> list[Part]:
    """Runs of side by side experts that are long enough, and what lies between them."""
    breaks = np.flatnonzero(np.diff(hit) != 1) + 1
    bounds = [0, *breaks.tolist(), hit.size]
    least = max(2, -(-RUN_BYTES // expert_bytes))
    spans: list[tuple[int, int, bool]] = []
    for start, stop in pairwise(bounds):
        run = stop - start >= least
        if not run and spans and not spans[-1][2]:
            spans[-1] = (spans[-1][0], stop, False)
        else:
            spans.append((start, stop, run))
    return [
        Part(start, stop, int(hit[start]), None if run else torch.from_numpy(hit[start:stop]))
        for start, stop, run in spans
    ]


def choose_rows(counts: Ints) -> int:
    """P for experts with these many rows: padding costs as much as a row, rows beyond P cost a call of their own."""
    most = int(counts.max())
    if counts.size * most <= 1.25 * counts.sum():
        return most
    best, best_cost = most, float(counts.size * most)
    for rows in np.unique(counts).tolist():
        beyond = counts[counts > rows] - rows
        cost = counts.size * rows + float(beyond.sum()) + beyond.size * CALL_ROWS
        if cost < best_cost:
            best, best_cost = rows, cost
    return best


def run_batch(layer: Layer, ways: Ways, x: torch.Tensor, slots: Slots, weights: torch.Tensor) -> torch.Tensor:
    """x[T, D], slots of T tokens, weights[T, K] -> [T, O]."""
    num_hit, padded = slots.hit.size, choose_rows(slots.counts)
    within = np.arange(slots.num_slots) - np.repeat(slots.starts, slots.counts)
    places = np.repeat(np.arange(num_hit) * padded, slots.counts) + within
    beyond = within >= padded
    places[beyond] = num_hit * padded + np.arange(int(beyond.sum()))
    # Padding is a copy of token 0; its results are not used.
    source = np.zeros(num_hit * padded + int(beyond.sum()), np.int64)
    source[places] = slots.tokens
    rows = torch.index_select(x, 0, torch.from_numpy(source), out=scratch("rows", (source.size, x.shape[1]), x.dtype))
    y = scratch("y", (source.size, layer.width_out), x.dtype)
    grid = (num_hit, padded)
    batch, out = rows[: num_hit * padded].view(*grid, -1), y[: num_hit * padded].view(*grid, -1)
    for part in find_parts(slots.hit, layer.first.matrices[0].nbytes):
        _run_part(layer, part, slots, batch[part.start : part.stop], out[part.start : part.stop])
    start = num_hit * padded
    for e, count in zip(slots.hit.tolist(), (slots.counts - padded).tolist(), strict=True):
        if count > 0:
            y[start : start + count] = run_one(layer, ways, e, rows[start : start + count])
            start += count
    return combine(y, places, slots, weights)


def _run_part(layer: Layer, part: Part, slots: Slots, x: torch.Tensor, out: torch.Tensor) -> None:
    """x[n, P, D] -> out[n, P, O]."""
    n, rows, _ = x.shape
    experts = slots.hit[part.start : part.stop].tolist()
    turned = rows >= MANY_ROWS and x.dtype != torch.float32
    hs = [
        _first(p, part, experts, x, name, turned) for p, name in zip(layer.products_in, ("first", "up"), strict=False)
    ]
    up = hs[1] if len(hs) > 1 else None
    if turned:
        a = layer.activation(hs[0], up, scratch("a", (n, layer.width, rows), x.dtype), axis=1).transpose(1, 2)
    else:
        a = layer.activation(hs[0], up, scratch("a", (n, rows, layer.width), x.dtype))
    w = part.matrices(layer.second.matrices)
    torch.bmm(a, w.transpose(1, 2), out=out)
    if layer.second.b is not None:
        out += torch.stack([layer.second.b[e] for e in experts]).to(out.dtype).unsqueeze(1)


def _first(product: Product, part: Part, experts: list[int], x: torch.Tensor, name: str, turned: bool) -> torch.Tensor:
    """x[n, P, D] -> [n, P, N], or [n, N, P] where `turned`."""
    w = part.matrices(product.matrices)
    n, rows, _ = x.shape
    b = None if product.b is None else torch.stack([product.b[e] for e in experts]).to(x.dtype)
    if turned:
        h = torch.bmm(w, x.transpose(1, 2), out=scratch(name, (n, w.shape[1], rows), x.dtype))
        return h if b is None else h.add_(b.unsqueeze(2))
    h = torch.bmm(x, w.transpose(1, 2), out=scratch(name, (n, rows, w.shape[1]), x.dtype))
    return h if b is None else h.add_(b.unsqueeze(1))
