"""One expert after the other: the way for large experts, whose products keep all cores busy on their own.

S slots that have an expert, D model width, F expert width, O output width, N outputs, C inputs, M rows of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from moec.backends.cpu.machine import Machine, onednn_linear
from moec.backends.cpu.operands import Layer, Product
from moec.backends.cpu.scratch import scratch
from moec.backends.cpu.slots import Slots
from moec.backends.cpu.sums import combine

# Rows for which weights @ rows.T, which reads the weights as they lie, beats rows @ weights.T in bf16, which first
# brings them into the order that bf16 instructions want. Found to hold for expert sizes from 0.5 to 15 MB.
TRANSPOSED_ROWS = range(32, 129)
# Multiply-adds from which oneDNN's fixed cost of about 10 microseconds a call is won back.
ONEDNN_WORK = 2**19
# Up to this much between the products, one activation for all experts is cheaper than one each; beyond it, what an
# expert's first product wrote is better used while it is in the cache.
TOGETHER_BYTES = 4 * 2**20


class Ways:
    """How one expert's product is computed: by oneDNN from packed weights where there are any, else as fits."""

    def __init__(self, machine: Machine, packed: dict[str, Sequence[torch.Tensor]] | None = None) -> None:
        self._machine, self._packed = machine, packed or {}

    def linear(self, name: str, product: Product, e: int, x: torch.Tensor) -> torch.Tensor:
        """x[M, C] -> [M, N], possibly transposed in memory: x @ w[e].T + b[e]."""
        b = None if product.b is None else product.b[e].to(x.dtype)
        packed = self._packed.get(name)
        if packed is not None:
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
        if x.dtype == torch.float32 and self._machine.onednn_f32 and x.shape[0] * w.numel() >= ONEDNN_WORK:
            return onednn_linear(x, w, b)
        if self._transposed(x, w):
            y = torch.mm(w, x.t()).t()
            return y if b is None else y.add_(b)
        return F.linear(x, w, b)

    def _transposed(self, x: torch.Tensor, w: torch.Tensor) -> bool:
        rows = x.shape[0]
        # Groups of 32 columns that are at most half full are computed well, those fuller but not full are not.
        return (
            rows in TRANSPOSED_ROWS
            and rows % 32 <= 16
            and x.dtype == torch.bfloat16
            and x.dtype in self._machine.native
            and w.stride(-1) == 1
        )


def run_each(layer: Layer, ways: Ways, x: torch.Tensor, slots: Slots, weights: torch.Tensor) -> torch.Tensor:
    """x[T, D], slots of T tokens, weights[T, K] -> [T, O]."""
    num_slots = slots.num_slots
    tokens = torch.from_numpy(slots.tokens)
    rows = torch.index_select(x, 0, tokens, out=scratch("rows", (num_slots, x.shape[1]), x.dtype))
    experts, counts = slots.hit.tolist(), slots.counts.tolist()
    parts = rows.split(counts)
    if num_slots * layer.width_in * x.itemsize <= TOGETHER_BYTES:
        ys = _by_product(layer, ways, experts, parts)
    else:
        ys = [run_one(layer, ways, e, part) for e, part in zip(experts, parts, strict=True)]
    y = torch.cat(ys, out=scratch("y", (num_slots, layer.width_out), x.dtype))
    return combine(y, np.arange(num_slots), slots, weights)


def _by_product(layer: Layer, ways: Ways, experts: list[int], parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Parts [M, D] -> [M, O]: the first product of all experts, one activation, the second product of all."""
    num_rows, dtype = sum(part.shape[0] for part in parts), parts[0].dtype
    both: list[torch.Tensor] = []
    for name, product in zip(("first", "up"), layer.products_in, strict=False):
        h = [ways.linear(name, product, e, part) for e, part in zip(experts, parts, strict=True)]
        both.append(torch.cat(h, out=scratch(name, (num_rows, h[0].shape[1]), dtype)))
    a = layer.activation(both[0], both[1] if len(both) > 1 else None, scratch("a", (num_rows, layer.width), dtype))
    rows = a.split([part.shape[0] for part in parts])
    return [ways.linear("second", layer.second, e, row) for e, row in zip(experts, rows, strict=True)]


def run_one(layer: Layer, ways: Ways, e: int, x: torch.Tensor) -> torch.Tensor:
    """x[M, D] -> [M, O]: one expert on its rows."""
    h = ways.linear("first", layer.first, e, x)
    up = None if layer.up is None else ways.linear("up", layer.up, e, x)
    if h.is_contiguous():
        a = layer.activation(h, up, scratch("a", (x.shape[0], layer.width), x.dtype))
    else:
        # Both lie transposed, so the activation is computed on the transpose, along memory.
        up = None if up is None else up.t()
        a = layer.activation(h.t(), up, scratch("a", (layer.width, x.shape[0]), x.dtype), axis=0).t()
    return ways.linear("second", layer.second, e, a)
