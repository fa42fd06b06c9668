"""The fast way for an `expert_ffn`. T tokens, K experts per token, D model width, O output width."""

from __future__ import annotations

import torch

from moec.backends.cpu.activation import FastActivation
from moec.backends.cpu.batch import run_batch, run_token
from moec.backends.cpu.choose import BATCH, FEW, GROUPED, TABLES, choose, choose_few
from moec.backends.cpu.each import Ways, run_each
from moec.backends.cpu.few import run_few
from moec.backends.cpu.grouped import run_grouped
from moec.backends.cpu.in_order import run_in_order
from moec.backends.cpu.machine import machine
from moec.backends.cpu.operands import Layer, Sizes, expert_layer
from moec.backends.cpu.pack import Packed, find_tables, pack
from moec.backends.cpu.slots import find_slots, listed
from moec.backends.cpu.tables import run_tables, run_tables_as_they_come
from moec.backends.reference.dtypes import DTYPES
from moec.backends.reference.frame import Frame
from moec.ir import ExpertFfn


class FastExperts:
    """Runs one expert_ffn. Weights are read from the frame on each call; packed copies are this object's own."""

    device = "cpu"

    def __init__(self, op: ExpertFfn) -> None:
        self.op = op
        self._activation, self._sizes = FastActivation(op), Sizes.of(op)
        self._packed = Packed()

    @property
    def nbytes_packed(self) -> int:
        """Bytes of packed copies."""
        return self._packed.nbytes

    def pack(self, at: Frame) -> None:
        """Copy the weights into the layout that is fastest here."""
        layer = expert_layer(self.op, self._activation, self._sizes, at)
        self._packed = pack(layer, DTYPES[self.op.x.type.dtype], machine())

    def run(self, at: Frame) -> tuple[torch.Tensor, ...]:
        """The op's result for the frame's inputs."""
        op = self.op
        layer = expert_layer(op, self._activation, self._sizes, at)
        return (run_experts(layer, self._packed, at.tensor(op.x), at.tensor(op.experts), at.tensor(op.weights)),)

    def describe(self) -> str:
        """The ways it has, and what is packed."""
        return f"hit experts only, by work per expert each, in batches or as tables{self._packed}"


def run_experts(
    layer: Layer, packed: Packed, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, way: str | None = None
) -> torch.Tensor:
    """x[T, D], ids[T, K], weights[T, K] -> [T, O], by `way` or by the one that fits best."""
    tables = find_tables(layer, packed, x.dtype)
    few = listed(ids, layer.sizes.num_experts)
    if few:
        first = way or choose_few(layer, few, x.shape[0], x.dtype, machine(), packed, tables=bool(tables))
        if first == TABLES:
            return run_tables_as_they_come(layer, tables, x, ids, weights)
        if first == FEW:
            return run_few(layer, x, few, weights)
        if first == BATCH and x.shape[0] == 1:
            return run_token(layer, x, ids, weights)
    slots = find_slots(ids, layer.sizes.num_experts)
    if slots.num_slots == 0:
        return x.new_zeros(x.shape[0], layer.sizes.width_out)
    way = way or choose(layer, slots, x.dtype, machine(), packed, tables=bool(tables))
    if way == TABLES:
        return run_tables(layer, tables, x, slots, weights)
    if way == GROUPED:
        return run_grouped(layer, x, slots, weights)
    if way == BATCH:
        return run_batch(layer, x, slots, weights)
    ways = Ways(machine(), packed.onednn)
    return (run_in_order if slots.in_order else run_each)(layer, ways, x, slots, weights)
