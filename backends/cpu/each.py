"""One expert after the other: the way for large experts, whose products keep all cores busy on their own.

S slots that have an expert, D model width, F expert width, O output width, N outputs, C inputs, M rows of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from moec.backends.cpu.activation import FastActivation
from moec.backends.cpu.machine import Machine, onednn_linear
from moec.backends.cpu.operands import Layer, Product, Row
from moec.backends.cpu.scratch import scratch
from moec.backends.cpu.slots import Slots
from moec.backends.cpu.sums import combine

# rows @ weights.T in 16 bits first brings the weights into the order that the CPU's instructions want. weights @ rows.T
# reads them as they lie, so for some dozens of rows, in full groups of this many, it is faster by a tenth to a half.
GROUP = 16
FULL_GROUPS = frozenset({32, 48, 64, 96, 128})
# Multiply-adds from which oneDNN's fixed cost of about 10 microseconds a call is won back: from packed weights, and
# from weights as they lie.
PACKED_WORK, PLAIN_WORK = 2**18, 3 * 2**19
# Up to this much between the products, one activation for all experts is cheaper than one each; beyond it, what an
# expert's first product wrote is better used while it is in the cache.
TOGETHER_BYTES = 4 * 2**20


class Ways:
    """How one expert's product is computed: by oneDNN from packed weights where there are any, else as fits."""

    def __init__(self, machine: Machine, packed: dict[str, Sequence[torch.Tensor]] | None = None) -> None:
        self._machine, self._packed = machine, packed or {}

    def linear(self, name: str, product: Product, e: int, x: torch.Tensor) -> torch.Tensor:
        """x[M, C] -> [M, N]: x @ w[e].T + b[e]."""
        b = None if product.b is None else product.b[e].to(x.dtype)
        packed = self._packed.get(name)
        if packed is not None and x.shape[0] * packed[e].numel() >= PACKED_WORK:
            return onednn_linear(x, packed[e], b)
        w = product.w[e]
        if product.scale is not None:
            # i8 is exact in every floating point type, so only the sum is rounded.
            y = self._plain(x, w.to(x.dtype), None).mul_(product.scale[e])
            return y if b is None else y.add_(b)
        return self._plain(x, w, b)

    def _plain(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        """x[M, C], w[N, C], b[N]? -> [M, N] from weights as they lie."""
        if x.itemsize == 2 and x.dtype not in self._machine.native:
            return self._plain(x.float(), w.float(), None if b is None else b.float()).to(x.dtype)
        if x.dtype == torch.float32 and self._machine.onednn_f32 and x.shape[0] * w.numel() >= PLAIN_WORK:
            return onednn_linear(x, w, b)
        return F.linear(x, w, b)

    def plain(self, layer: Layer, dtype: torch.dtype, rows: int) -> bool:
        """Whether torch's own linear is the way for all products of experts with at most this many rows."""
        if self._packed or not layer.sizes.alike:
            return False
        if dtype.itemsize == 2:
            return dtype in self._machine.native and rows <= GROUP
        onednn = dtype == torch.float32 and self._machine.onednn_f32
        return not onednn or rows * layer.sizes.matrix_bytes // dtype.itemsize < PLAIN_WORK

    def turned(self, layer: Layer, dtype: torch.dtype, rows: int) -> int:
        """How many rows to compute for this many with weights on the left, 0 where they stay on the right."""
        padded = -(-rows // GROUP) * GROUP
        if rows <= GROUP or padded not in FULL_GROUPS or self._packed:
            return 0
        if dtype.itemsize != 2 or dtype not in self._machine.native:
            return 0
        plain = all(p.scale is None and p.w[0].stride(-1) == 1 for p in layer.products.values())
        return padded if plain else 0


def run_each(layer: Layer, ways: Ways, x: torch.Tensor, slots: Slots, weights: torch.Tensor) -> torch.Tensor:
    """x[T, D], slots of T tokens, weights[T, K] -> [T, O]."""
    num_slots = slots.num_slots
    experts, counts = slots.hit.tolist(), slots.counts.tolist()
    if ways.plain(layer, x.dtype, max(counts)):
        parts = x.index_select(0, torch.from_numpy(slots.tokens)).split(counts)
        ys = [run_plain(row, layer.activation, part) for row, part in zip(layer.rows(experts), parts, strict=True)]
        return combine(torch.cat(ys), np.arange(num_slots), slots, weights)
    # Rows behind the last one may be computed along with it; what they hold does not matter.
    buffer = scratch("rows", (num_slots + GROUP, x.shape[1]), x.dtype)
    rows = buffer[:num_slots]
    torch.index_select(x, 0, torch.from_numpy(slots.tokens), out=rows)
    if num_slots <= GROUP * len(experts) and num_slots * layer.sizes.width_in * x.itemsize <= TOGETHER_BYTES:
        ys = _by_product(layer, ways, experts, rows.split(counts))
    else:
        ys = []
        for e, start, count in zip(experts, slots.starts.tolist(), counts, strict=True):
            ys.append(run_one(layer, ways, e, buffer[start:], count))
    y = torch.cat(ys, out=scratch("y", (num_slots, layer.sizes.width_out), x.dtype))
    return combine(y, np.arange(num_slots), slots, weights)


def run_plain(row: Row, activation: FastActivation, x: torch.Tensor) -> torch.Tensor:
    """x[M, D] -> [M, O]: one expert on its rows, by torch's own linear."""
    w, b, w_up, b_up, w_out, b_out = row
    h = F.linear(x, w, b)
    up = None if w_up is None else F.linear(x, w_up, b_up)
    return F.linear(activation.over(h, up), w_out, b_out)


def _by_product(layer: Layer, ways: Ways, experts: list[int], parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Parts [M, D] -> [M, O]: the first product of all experts, one activation, the second product of all."""
    num_rows, dtype = sum(part.shape[0] for part in parts), parts[0].dtype
    both: list[torch.Tensor] = []
    for name, product in zip(("first", "up"), layer.products_in, strict=False):
        h = [ways.linear(name, product, e, part) for e, part in zip(experts, parts, strict=True)]
        both.append(torch.cat(h, out=scratch(name, (num_rows, h[0].shape[1]), dtype)))
    a = layer.activation(
        both[0], both[1] if len(both) > 1 else None, scratch("a", (num_rows, layer.sizes.width), dtype)
    )
    rows = a.split([part.shape[0] for part in parts])
    return [ways.linear("second", layer.second, e, row) for e, row in zip(experts, rows, strict=True)]


def run_one(layer: Layer, ways: Ways, e: int, x: torch.Tensor, rows: int) -> torch.Tensor:
    """The first M = `rows` of x[>= M, D] -> [M, O]: one expert on its rows."""
    padded = ways.turned(layer, x.dtype, rows)
    if padded and padded <= x.shape[0]:
        return _run_turned(layer, e, x[:padded])[:, :rows].t()
    x = x[:rows]
    h = ways.linear("first", layer.first, e, x)
    up = None if layer.up is None else ways.linear("up", layer.up, e, x)
    a = layer.activation(h, up, scratch("a", (rows, layer.sizes.width), x.dtype))
    return ways.linear("second", layer.second, e, a)


def _run_turned(layer: Layer, e: int, x: torch.Tensor) -> torch.Tensor:
    """x[M, D] -> [O, M]: one expert with weights on the left of both products."""
    h, *up = (_left(product, e, x.t()) for product in layer.products_in)
    a = layer.activation(h, up[0] if up else None, scratch("a", (layer.sizes.width, x.shape[0]), x.dtype), axis=0)
    return _left(layer.second, e, a)


def _left(product: Product, e: int, x: torch.Tensor) -> torch.Tensor:
    """x[C, M] -> [N, M]: w[e] @ x + b[e]."""
    y = torch.mm(product.w[e], x)
    return y if product.b is None else y.add_(product.b[e].to(x.dtype).unsqueeze(1))
