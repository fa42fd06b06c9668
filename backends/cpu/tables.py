"""Small experts as tables of rows: a product with one row is a weighted sum of the matrix's input rows.

Where the matrices lie with their inputs outermost, w[E, C, N], expert e's product with x is the sum over c of
x[c] * table[e*C + c]: what `embedding_bag` computes, for all slots in one call, reading only the experts they name.
Weights lie so in the models that store them transposed, and in packed copies.
S slots that have an expert, C inputs, N outputs, D model width, F expert width, O output width.
"""

from __future__ import annotations

import numpy as np
import torch

from moec.backends.cpu.operands import Layer, Product
from moec.backends.cpu.slots import Slots
from moec.backends.cpu.sums import bags, combine, combine_one, weighted


def table_of(w: torch.Tensor | None) -> torch.Tensor | None:
    """w[E, N, C] that lies as [E, C, N] -> the table [E*C, N], a view; None where it lies otherwise."""
    if w is None:
        return None
    turned = w.transpose(1, 2)
    return turned.flatten(0, 1) if turned.is_contiguous() else None


def run_tables(
    layer: Layer, tables: dict[str, torch.Tensor], x: torch.Tensor, slots: Slots, weights: torch.Tensor
) -> torch.Tensor:
    """x[T, D], slots of T tokens, weights[T, K] -> [T, O]; `tables` holds those of first, second and maybe up."""
    # Sorted by expert, so that what one row read is in the cache for the next.
    ids = torch.from_numpy(np.repeat(slots.hit, slots.counts))
    rows = x.index_select(0, torch.from_numpy(slots.tokens))
    return combine(_rows(layer, tables, ids, rows), np.arange(slots.num_slots), slots, weights)


def run_tables_as_they_come(
    layer: Layer, tables: dict[str, torch.Tensor], x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """x[T, D], ids[T, K] that all name an expert, weights[T, K] -> [T, O]: for few tokens, not worth sorting."""
    num_tokens, k = ids.shape
    y = _rows(layer, tables, ids.reshape(-1).long(), x.repeat_interleave(k, 0))
    if num_tokens == 1:
        return combine_one(y, weights)
    starts = torch.arange(0, num_tokens * k, k, device="cpu")
    return weighted(y, torch.arange(num_tokens * k, device="cpu"), starts, weights.reshape(-1))


def _rows(layer: Layer, tables: dict[str, torch.Tensor], ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x[S, D], ids[S] -> [S, O]: each row through its expert."""
    h = _product(layer.first, tables["first"], ids, x)
    up = None if layer.up is None else _product(layer.up, tables["up"], ids, x)
    a = layer.activation(h, up, h.new_empty(h.shape[0], layer.sizes.width))
    return _product(layer.second, tables["second"], ids, a)


def _product(product: Product, table: torch.Tensor, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x[S, C], ids[S] -> [S, N]: each row by its expert's matrix."""
    num_slots, inputs = x.shape
    index = (ids.unsqueeze(1) * inputs + torch.arange(inputs, device="cpu")).view(-1)
    y = bags(table, index, torch.arange(0, num_slots * inputs, inputs, device="cpu"), x.reshape(-1))
    if product.b is not None:
        b = product.b
        y += b.index_select(0, ids) if isinstance(b, torch.Tensor) else torch.stack([b[e] for e in ids.tolist()])
    return y
