"""Which way to run a layer of experts: by the work that one expert has, never by names or known sizes.

A call for one expert costs 15 to 30 microseconds before it does anything. Large experts do not notice; for small ones
the ways that run several in a call win, until an expert's rows are work enough. The limits below are where the ways
were measured to cross on several layers of either kind; none of them is sharp.
"""

from __future__ import annotations

import torch

from moec.backends.cpu.batch import PART_BYTES
from moec.backends.cpu.each import GROUP
from moec.backends.cpu.grouped import fits_grouped
from moec.backends.cpu.machine import Machine
from moec.backends.cpu.operands import Layer
from moec.backends.cpu.pack import Packed
from moec.backends.cpu.slots import Slots

EACH, BATCH, GROUPED, TABLES = "each", "batch", "grouped", "tables"

# An expert of this many bytes keeps the cores busy with one row.
LARGE_BYTES = 3 * 2**20
# Rows per expert up to which weighted sums of table rows beat products: a product reads the weights once for all rows.
TABLE_ROWS = 12
# Operations per expert from which one call for each is as good as a batch, by the size of an element.
BATCH_WORK = {4: 8e6, 2: 120e6}


def choose(layer: Layer, slots: Slots, dtype: torch.dtype, machine: Machine, packed: Packed, *, tables: bool) -> str:
    """The way for these slots; `tables` says whether the layer has them, packed or because it lies so."""
    rows = slots.num_slots / slots.hit.size
    if tables and rows <= TABLE_ROWS:
        return TABLES
    if not _takes_several(layer, dtype, machine, packed):
        return EACH
    if slots.hit.size > 1 and _small(layer, rows, dtype):
        return BATCH
    return GROUPED if dtype.itemsize == 2 and rows <= GROUP and fits_grouped(layer) else EACH


def choose_token(layer: Layer, k: int, dtype: torch.dtype, machine: Machine, packed: Packed) -> str:
    """The way for one token with K experts, before anything is known about them: a batch, or "" where others may do."""
    copied = k * layer.sizes.expert_bytes
    several = k > 1 and copied <= PART_BYTES and _takes_several(layer, dtype, machine, packed)
    return BATCH if several and _small(layer, 1, dtype) else ""


def _takes_several(layer: Layer, dtype: torch.dtype, machine: Machine, packed: Packed) -> bool:
    """Whether products of several experts at once are possible and fast."""
    return (dtype == torch.float32 or dtype in machine.native) and not packed.onednn and layer.stacked


def _small(layer: Layer, rows: float, dtype: torch.dtype) -> bool:
    """Whether experts with so many rows each are better off in batches."""
    small = layer.sizes.expert_bytes < LARGE_BYTES
    return small and 2 * rows * layer.sizes.elements <= BATCH_WORK[dtype.itemsize]
