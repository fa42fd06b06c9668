"""All experts' products in one call of torch's own grouped product, which takes them one by one without Python between.

The way for a few rows of middling experts in 16 bits, where each product is short but not shorter than a copy.
S slots that have an expert, E experts, D model width, F expert width, O output width, N outputs, C inputs.
"""

from __future__ import annotations

import numpy as np
import torch

from moec.backends.cpu.operands import Layer, Product, bias_rows
from moec.backends.cpu.scratch import scratch
from moec.backends.cpu.slots import Slots
from moec.backends.cpu.sums import combine

# What torch asks of the distance between rows, and of where they begin.
ALIGNED_BYTES = 16


def fits_grouped(layer: Layer) -> bool:
    """Whether torch's grouped product is there and takes these weights."""
    if not hasattr(torch.nn.functional, "grouped_mm") or not layer.stacked:
        return False
    return all(_aligned(product.matrices) for product in layer.products.values())


def _aligned(w: torch.Tensor) -> bool:
    """Whether one of the inner axes of w[E, N, C] is dense, and rows and start are aligned."""
    row = w.stride(1) if w.stride(2) == 1 else w.stride(2)
    dense = 1 in (w.stride(1), w.stride(2))
    places = (row * w.itemsize, w.stride(0) * w.itemsize, w.data_ptr())
    widths = (w.shape[1] * w.itemsize, w.shape[2] * w.itemsize)
    return dense and all(place % ALIGNED_BYTES == 0 for place in (*places, *widths))


def run_grouped(layer: Layer, x: torch.Tensor, slots: Slots, weights: torch.Tensor) -> torch.Tensor:
    """x[T, D], slots of T tokens, weights[T, K] -> [T, O]."""
    tokens = torch.from_numpy(slots.tokens)
    rows = torch.index_select(x, 0, tokens, out=scratch("rows", (slots.num_slots, x.shape[1]), x.dtype))
    counts = np.zeros(layer.sizes.num_experts, np.int32)
    counts[slots.hit] = slots.counts
    ends = torch.from_numpy(np.cumsum(counts, dtype=np.int32))
    h, *up = (_product(product, rows, ends, slots) for product in layer.products_in)
    a = layer.activation(h, up[0] if up else None, scratch("a", (slots.num_slots, layer.sizes.width), x.dtype))
    y = _product(layer.second, a, ends, slots)
    return combine(y, np.arange(slots.num_slots), slots, weights)


def _product(product: Product, x: torch.Tensor, ends: torch.Tensor, slots: Slots) -> torch.Tensor:
    """x[S, C], ends[E] -> [S, N]: each expert's rows by its matrix."""
    y = torch.nn.functional.grouped_mm(x, product.matrices.transpose(1, 2), offs=ends)
    if product.b is not None:
        y += bias_rows(product.b, slots.hit.tolist(), slots.counts.tolist(), y.dtype)
    return y
