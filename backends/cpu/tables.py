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
from moec.backends.cpu.sums import bags, combine, combine_one


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
    experts = np.repeat(slots.hit, slots.counts)
    rows = x.index_select(0, torch.from_numpy(slots.tokens))
    ids = torch.from_numpy(experts)
    h = _product(layer.first, tables["first"], ids, rows)
    up = None if layer.up is None else _product(layer.up, tables["up"], ids, rows)
    a = layer.activation(h, up, h.new_empty(h.shape[0], layer.width))
    y = _product(layer.second, tables["second"], ids, a)
    if slots.num_tokens == 1 and slots.all_there:
        return combine_one(y, weights[:, torch.from_numpy(slots.order)])
    return combine(y, np.arange(slots.num_slots), slots, weights)


def _product(product: Product, table: torch.Tensor, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x[S, C], ids[S] -> [S, N]: each row by its expert's matrix."""
    num_slots, inputs = x.shape
    index = (ids.unsqueeze(1) * inputs + torch.arange(inputs)).view(-1)
    y = bags(table, index, torch.arange(0, num_slots * inputs, inputs), x.reshape(-1))
    if product.b is not None:
        b = product.b
        y += b.index_select(0, ids) if isinstance(b, torch.Tensor) else torch.stack([b[e] for e in ids.tolist()])
    return y
