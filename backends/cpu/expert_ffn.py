"""The fast way for an `expert_ffn`. T tokens, K experts per token, D model width, O output width."""

from __future__ import annotations

import torch

from moec.backends.cpu.activation import FastActivation
from moec.backends.cpu.batch import run_batch
from moec.backends.cpu.choose import BATCH, PAIRS, TABLES, choose
from moec.backends.cpu.each import Ways, run_each
from moec.backends.cpu.machine import machine
from moec.backends.cpu.operands import Layer, expert_layer
from moec.backends.cpu.pack import Packed, find_tables, pack
from moec.backends.cpu.pairs import run_pairs
from moec.backends.cpu.slots import find_slots
from moec.backends.cpu.tables import run_tables
from moec.backends.reference.dtypes import DTYPES
from moec.backends.reference.frame import Frame
from moec.ir import ExpertFfn


class FastExperts:
    """Runs one expert_ffn. Weights are read from the frame on each call; packed copies are this object's own."""

    def __init__(self, op: ExpertFfn) -> None:
        self.op = op
        self._activation = FastActivation(op)
        self._packed = Packed()

    @property
    def nbytes_packed(self) -> int:
        """Bytes of packed copies."""
        return self._packed.nbytes

    def pack(self, at: Frame) -> None:
        """Copy the weights into the layout that is fastest here."""
        layer = expert_layer(self.op, self._activation, at)
        self._packed = pack(layer, DTYPES[self.op.x.type.dtype], machine())

    def run(self, at: Frame) -> tuple[torch.Tensor, ...]:
        """The op's result for the frame's inputs."""
        op = self.op
        layer = expert_layer(op, self._activation, at)
        return (run_experts(layer, self._packed, at.tensor(op.x), at.tensor(op.experts), at.tensor(op.weights)),)

    def describe(self) -> str:
        """The ways it has, and what is packed."""
        return f"hit experts only, by work per expert each, in pairs, in batches or as tables{self._packed}"


def run_experts(
    layer: Layer, packed: Packed, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, way: str | None = None
) -> torch.Tensor:
    """x[T, D], ids[T, K], weights[T, K] -> [T, O], by `way` or by the one that fits best."""
    slots = find_slots(ids, layer.num_experts)
    if slots.num_slots == 0:
        return x.new_zeros(x.shape[0], layer.width_out)
    tables = find_tables(layer, packed, x.dtype)
    way = way or choose(layer, slots, x.dtype, machine(), packed=bool(packed.onednn), tables=bool(tables))
    if way == TABLES:
        return run_tables(layer, tables, x, slots, weights)
    if way == PAIRS:
        return run_pairs(layer, x, slots, weights)
    ways = Ways(machine(), packed.onednn)
    if way == BATCH:
        return run_batch(layer, ways, x, slots, weights)
    return run_each(layer, ways, x, slots, weights)
