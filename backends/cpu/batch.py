"""Many experts in one batched product: the way for small experts, whose products cost more in calls than in work.

The rows of the experts of one product are padded to the same number. Hit experts that lie side by side are a view of
the weights; scattered ones are copied together. Experts that are not hit are not read.
S slots that have an expert, H hit experts, P rows of each expert of a part, N rows with padding, D model width,
F expert width, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from moec.backends.cpu.copies import copy_experts
from moec.backends.cpu.operands import Layer, Product
from moec.backends.cpu.scratch import scratch
from moec.backends.cpu.slots import Ints, Slots
from moec.backends.cpu.sums import combine, combine_one
from moec.backends.reference.joined import Experts

# What a core does in a second, roughly: bytes copied, operations in fp32 and in 16 bits. Only their ratios matter.
COPY_RATE = 45e9
WORK_RATE = {4: 120e9, 2: 500e9}
# A product for some experts costs at least this much, in seconds, however small it is.
CALL_SECONDS = 60e-6
# Copies of one part; more than that would not stay in any cache.
PART_BYTES = 16 * 2**20
# Rows from which weights on the left are faster in 16 bits; in fp32 they never are.
MANY_ROWS = 16


@dataclass(frozen=True, slots=True)
class Part:
    """Some hit experts with `rows` rows each from row `start` on; side by side ones are used where they lie."""

    experts: Ints
    start: int
    rows: int
    beside: bool

    def matrices(self, w: torch.Tensor) -> torch.Tensor:
        """w[E, N, C] -> [n, N, C] of these experts: a view of w, or a copy in a buffer."""
        if self.beside:
            first = int(self.experts[0])
            return w[first : first + self.experts.size]
        return copy_experts(w, self.experts)


def find_parts(slots: Slots, layer: Layer) -> list[Ints]:
    """The hit experts, as ranks, in parts for one product each: by place or by number of rows, whichever costs less.

    By place, runs of side by side experts need no copy but all are padded to the most rows; by number of rows,
    everything is copied and little is padded.
    """
    itemsize = layer.second.matrices.itemsize
    by_place = _by_place(slots, layer.sizes.expert_bytes)
    if int(slots.counts.max()) * slots.hit.size <= slots.num_slots:
        return by_place
    by_rows = _by_rows(slots, layer.sizes.expert_bytes)
    costs = [_seconds(parts, slots, layer, itemsize) for parts in (by_place, by_rows)]
    return by_place if costs[0] <= costs[1] else by_rows


def _seconds(parts: list[Ints], slots: Slots, layer: Layer, itemsize: int) -> float:
    """What running these parts takes, roughly."""
    total = 0.0
    for ranks in parts:
        work = 2.0 * ranks.size * int(slots.counts[ranks].max()) * layer.sizes.elements
        copied = 0 if _beside(slots.hit[ranks]) else ranks.size * layer.sizes.expert_bytes
        total += CALL_SECONDS + work / WORK_RATE[itemsize] + copied / COPY_RATE
    return total


def _beside(experts: Ints) -> bool:
    return int(experts[-1]) - int(experts[0]) == experts.size - 1


def _by_place(slots: Slots, expert_bytes: int) -> list[Ints]:
    """Runs worth a product of their own, and what lies between them, in the order of the experts."""
    breaks = np.flatnonzero(np.diff(slots.hit) != 1) + 1
    least = max(2.0, CALL_SECONDS * COPY_RATE / expert_bytes)
    most = max(2, PART_BYTES // expert_bytes)
    parts: list[Ints] = []
    waiting = 0
    num_hit = slots.hit.size
    for start, stop in [*pairwise([0, *breaks.tolist(), num_hit]), (num_hit, num_hit)]:
        run = stop - start >= least
        if run or start == num_hit:
            parts += [np.arange(at, min(at + most, start)) for at in range(waiting, start, most)]
            waiting = stop
        if run:
            parts.append(np.arange(start, stop))
    return parts


def _by_rows(slots: Slots, expert_bytes: int) -> list[Ints]:
    """Experts with similar numbers of rows together: within a part, the most are at most a quarter above the least."""
    order = np.argsort(slots.counts, kind="stable")
    most = max(2, PART_BYTES // expert_bytes)
    parts: list[Ints] = []
    start = 0
    counts = slots.counts[order].tolist()
    for at in range(1, len(counts) + 1):
        if at == len(counts) or at - start == most or counts[at] > 1.25 * counts[start] + 1:
            parts.append(np.sort(order[start:at]))
            start = at
    return parts


def lay_out(slots: Slots, parts: list[Ints]) -> tuple[list[Part], Ints, int]:
    """The parts with their rows, places[S], the row of each slot, and N."""
    found = []
    base = np.empty(slots.hit.size, np.int64)
    num_rows = 0
    for ranks in parts:
        rows = int(slots.counts[ranks].max())
        experts = slots.hit[ranks]
        found.append(Part(experts, num_rows, rows, _beside(experts)))
        base[ranks] = num_rows + rows * np.arange(ranks.size)
        num_rows += rows * ranks.size
    if slots.num_slots == slots.hit.size:
        return found, base, num_rows
    within = np.arange(slots.num_slots) - np.repeat(slots.starts, slots.counts)
    return found, np.repeat(base, slots.counts) + within, num_rows


def run_batch(layer: Layer, x: torch.Tensor, slots: Slots, weights: torch.Tensor) -> torch.Tensor:
    """x[T, D], slots of T tokens, weights[T, K] -> [T, O]."""
    parts, places, num_rows = lay_out(slots, find_parts(slots, layer))
    # Padding is a copy of token 0; its results are not used.
    source = np.zeros(num_rows, np.int64)
    source[places] = slots.tokens
    rows = torch.index_select(x, 0, torch.from_numpy(source), out=scratch("rows", (num_rows, x.shape[1]), x.dtype))
    y = scratch("y", (num_rows, layer.sizes.width_out), x.dtype)
    for part in parts:
        n = part.experts.size
        span = slice(part.start, part.start + n * part.rows)
        _run_part(layer, part, rows[span].view(n, part.rows, -1), y[span].view(n, part.rows, -1))
    return combine(y, places, slots, weights)


def run_token(layer: Layer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x[1, D], ids[1, K] that all name an expert, weights[1, K] -> [1, O]: one row each, so nothing to sort or pad."""
    k = ids.numel()
    y = scratch("y", (k, layer.sizes.width_out), x.dtype)
    part = Part(ids.reshape(-1).long().numpy(), 0, 1, beside=False)
    _run_part(layer, part, x.expand(k, 1, x.shape[1]), y.unsqueeze(1))
    return combine_one(y, weights)


def _run_part(layer: Layer, part: Part, x: torch.Tensor, out: torch.Tensor) -> None:
    """x[n, P, D] -> out[n, P, O]."""
    n, rows, _ = x.shape
    a = scratch("a", (n, rows, layer.sizes.width), x.dtype)
    if x.itemsize == 2 and rows >= MANY_ROWS:
        h, *up = (_left(product, part, x.transpose(1, 2), name) for product, name in _named(layer))
        # Libraries want rows to be what is dense, also where they are the right side.
        a = layer.activation(h, up[0] if up else None, a.transpose(1, 2), axis=1)
        out.copy_(_left(layer.second, part, a, "turned").transpose(1, 2))
        return
    h, *up = (_right(product, part, x, name) for product, name in _named(layer))
    a = layer.activation(h, up[0] if up else None, a)
    torch.bmm(a, part.matrices(layer.second.matrices).transpose(1, 2), out=out)
    if layer.second.b is not None:
        out += _biases(layer.second.b, part, out.dtype).unsqueeze(1)


def _named(layer: Layer) -> list[tuple[Product, str]]:
    return list(zip(layer.products_in, ("first", "up"), strict=False))


def _right(product: Product, part: Part, x: torch.Tensor, name: str) -> torch.Tensor:
    """x[n, P, C] -> [n, P, N], with weights on the right."""
    w = part.matrices(product.matrices)
    y = torch.bmm(x, w.transpose(1, 2), out=scratch(name, (x.shape[0], x.shape[1], w.shape[1]), x.dtype))
    return y if product.b is None else y.add_(_biases(product.b, part, y.dtype).unsqueeze(1))


def _left(product: Product, part: Part, x: torch.Tensor, name: str) -> torch.Tensor:
    """x[n, C, P] -> [n, N, P], with weights on the left."""
    w = part.matrices(product.matrices)
    y = torch.bmm(w, x, out=scratch(name, (x.shape[0], w.shape[1], x.shape[2]), x.dtype))
    return y if product.b is None else y.add_(_biases(product.b, part, y.dtype).unsqueeze(2))


def _biases(b: Experts, part: Part, dtype: torch.dtype) -> torch.Tensor:
    """b[E, N] -> [n, N] of the part's experts."""
    return torch.stack([b[e] for e in part.experts.tolist()]).to(dtype)
