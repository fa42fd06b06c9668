"""Which way to run a layer of experts: by the work that one expert has, never by names or known sizes.

A call for one expert costs 15 to 30 microseconds before it does anything. Large experts do not notice; for small ones
the ways that run several in a call win, until an expert's rows are work enough. The limits below are where the ways
were measured to cross on several layers of either kind; none of them is sharp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.backends.cpu.machine import Machine
from moec.backends.cpu.operands import Layer
from moec.backends.cpu.slots import Slots

EACH, PAIRS, BATCH, TABLES = "each", "pairs", "batch", "tables"

# An expert of this many bytes keeps the cores busy with one row.
LARGE_BYTES = 4 * 2**20
# Rows per expert up to which weighted sums of table rows beat products: a product reads the weights once for all rows.
TABLE_ROWS = 12
# Operations per expert from which one call for each is as good as one for two, in fp32.
PAIR_WORK = 8e6
# Slots up to which widening 16-bit weights to fp32, two experts at a time, beats copying experts together.
WIDENED_SLOTS = 16
# Operations per expert from which one call for each is as good as a batch, in 16 bits.
BATCH_WORK = 120e6


@dataclass(frozen=True, slots=True)
class Work:
    """What the choice depends on: the bytes of one expert's weights, and the rows and operations of a hit expert."""

    expert_bytes: int
    slots: int
    rows: float
    operations: float


def work_of(layer: Layer, slots: Slots) -> Work:
    """The work that these slots are."""
    elements = 0
    nbytes = 0
    for product in layer.products.values():
        matrix = product.w[0]
        elements += matrix.numel()
        nbytes += matrix.nbytes
    rows = slots.num_slots / slots.hit.size
    return Work(nbytes, slots.num_slots, rows, 2 * rows * elements)


def choose(layer: Layer, slots: Slots, dtype: torch.dtype, machine: Machine, *, packed: bool, tables: bool) -> str:
    """The way for these slots; `packed` and `tables` say what the layer has besides its weights as they lie."""
    work = work_of(layer, slots)
    if tables and work.rows <= TABLE_ROWS:
        return TABLES
    if packed or not layer.stacked or work.expert_bytes >= LARGE_BYTES or slots.hit.size == 1:
        return EACH
    if dtype == torch.float32:
        return PAIRS if work.operations <= PAIR_WORK else EACH
    if dtype not in machine.native:
        # Products are computed in fp32 either way.
        return PAIRS if dtype.itemsize == 2 and work.operations <= PAIR_WORK else EACH
    if work.slots <= WIDENED_SLOTS:
        return PAIRS
    return BATCH if work.operations <= BATCH_WORK else EACH
