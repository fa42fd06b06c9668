"""Which way to run a layer of experts: by the work that one expert has, never by names or known sizes.

A call for one expert costs 15 to 30 microseconds before it does anything. Large experts do not notice; for small ones
the ways that run several in a call win, until an expert's rows are work enough. The limits below are where the ways
were measured to cross on several layers of either kind; none of them is sharp.
"""

from __future__ import annotations

import torch

from moec.backends.cpu.batch import PART_BYTES
from moec.backends.cpu.each import GROUP, Ways
from moec.backends.cpu.grouped import fits_grouped
from moec.backends.cpu.machine import Machine
from moec.backends.cpu.operands import Layer
from moec.backends.cpu.pack import Packed
from moec.backends.cpu.slots import Slots

EACH, FEW, BATCH, GROUPED, TABLES = "each", "few", "batch", "grouped", "tables"

# An expert of this many bytes keeps the cores busy with one row.
LARGE_BYTES = 3 * 2**20
# Rows per expert up to which weighted sums of table rows beat products: a product reads the weights once for all rows.
TABLE_ROWS = 12
# Up to so many hit experts of so few bytes, one call for each is over before a batch is laid out, by the size of an
# element; one token's batch needs no laying out, so half as many.
FEW_BYTES = 2**19
FEW_EXPERTS = {8: 8, 4: 8, 2: 4}
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


def choose_few(
    layer: Layer, ids: list[int], num_tokens: int, dtype: torch.dtype, machine: Machine, packed: Packed, *, tables: bool
) -> str:
    """The way for few slots, `ids` of experts, before they are sorted; "" where more must be known."""
    if tables:
        return TABLES
    plain = Ways(machine, packed.onednn).plain(layer, dtype, num_tokens)
    if not _takes_several(layer, dtype, machine, packed):
        return FEW if plain else ""
    most = FEW_EXPERTS[dtype.itemsize] // (2 if num_tokens == 1 else 1)
    if plain and layer.sizes.expert_bytes <= FEW_BYTES and len(set(ids)) <= most:
        return FEW
    several = num_tokens == 1 and len(ids) > 1 and len(ids) * layer.sizes.expert_bytes <= PART_BYTES
    return BATCH if several and _small(layer, 1, dtype) else ""


def _takes_several(layer: Layer, dtype: torch.dtype, machine: Machine, packed: Packed) -> bool:
    """Whether products of several experts at once are possible and fast."""
    return (dtype == torch.float32 or dtype in machine.native) and not packed.onednn and layer.stacked


def _small(layer: Layer, rows: float, dtype: torch.dtype) -> bool:
    """Whether experts with so many rows each are better off in batches."""
    small = layer.sizes.expert_bytes < LARGE_BYTES
    return small and 2 * rows * layer.sizes.elements <= BATCH_WORK[dtype.itemsize]
