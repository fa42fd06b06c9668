"""Packed copies of weights: which layout pays for which layer, and making them.

E experts, N outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from moec.backends.cpu.machine import Machine, onednn_pack
from moec.backends.cpu.operands import Layer, Product
from moec.backends.cpu.tables import table_of

# An expert whose matrices are smaller than this costs more in calls than in reading: as a table it needs one call for
# all experts. Larger ones are faster from a layout that is made for products.
TABLE_BYTES = 2 * 2**20
# A table sums in the order of its rows; in fp32 longer sums would lose more than the error bar allows.
TABLE_INPUTS = 1024


@dataclass
class Packed:
    """Copies of weights that a layer runs from. What lies right already is not copied, so `tables` may lack some."""

    tables: dict[str, torch.Tensor] = field(default_factory=dict)
    onednn: dict[str, Sequence[torch.Tensor]] = field(default_factory=dict)
    nbytes: int = 0
    why: str = ""

    def __str__(self) -> str:
        """For the end of a line that says what runs."""
        return f"; packed: {self.why}, {self.nbytes:,} bytes" if self.why else ""


def packs_as(layer: Layer, dtype: torch.dtype, machine: Machine) -> tuple[str, str]:
    """The layout to pack a layer in, "tables", "onednn" or "" for none, and why."""
    if any(p.scale is not None for p in layer.products.values()):
        return "", "nothing, int8 weights are used as they are"
    if layer.first.w[0].device.type != "cpu":
        return "", "nothing, the weights are not on a CPU"
    if layer.sizes.num_experts > 1 and fits_tables(layer, dtype):
        return "tables", "as tables"
    if machine.onednn and dtype in (torch.float32, torch.bfloat16):
        return "onednn", "for oneDNN"
    return "", f"nothing, there is no layout for {str(dtype).removeprefix('torch.')} here"


def fits_tables(layer: Layer, dtype: torch.dtype) -> bool:
    """Whether experts are small enough, and sums short enough, to be run as tables."""
    small = layer.sizes.matrix_bytes <= TABLE_BYTES and layer.sizes.inputs <= TABLE_INPUTS
    return small and dtype in (torch.float32, torch.bfloat16, torch.float16)


def pack(layer: Layer, dtype: torch.dtype, machine: Machine) -> Packed:
    """Copies of the layer's weights in the layout of `packs_as`."""
    form, why = packs_as(layer, dtype, machine)
    packed = pack_as(form, layer)
    packed.why = why
    return packed


def pack_as(form: str, layer: Layer) -> Packed:
    """Copies of the layer's weights in one layout; none are made of weights that lie so already."""
    packed = Packed()
    for name, product in layer.products.items():
        if form == "tables":
            if table_of(product.stack) is None:
                packed.tables[name] = table = _table(product)
                packed.nbytes += table.nbytes
        elif form == "onednn":
            packed.onednn[name] = [onednn_pack(product.w[e]) for e in range(len(product.w))]
            packed.nbytes += sum(product.w[e].nbytes for e in range(len(product.w)))
    return packed


def _table(product: Product) -> torch.Tensor:
    """[E*C, N]: every expert's matrix transposed, one after the other."""
    outputs, inputs = product.w[0].shape
    table = product.w[0].new_empty(len(product.w), inputs, outputs)
    for e in range(len(product.w)):
        table[e] = product.w[e].t()
    return table.flatten(0, 1)


def find_tables(layer: Layer, packed: Packed, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tables of all products, packed ones or views of weights that lie so; empty where one is missing."""
    if not packed.tables and (not fits_tables(layer, dtype) or table_of(layer.first.stack) is None):
        return {}
    found: dict[str, torch.Tensor] = {}
    for name, product in layer.products.items():
        table = packed.tables[name] if name in packed.tables else table_of(product.stack)
        if table is None or product.scale is not None:
            return {}
        found[name] = table
    return found
