"""The fast way for a `dense_ffn`: one expert that every row has. D model width, O output width."""

from __future__ import annotations

import torch

from moec.backends.cpu.activation import FastActivation
from moec.backends.cpu.each import Ways, run_one, run_plain
from moec.backends.cpu.machine import machine
from moec.backends.cpu.operands import Sizes, dense_layer
from moec.backends.cpu.pack import Packed, pack
from moec.backends.reference.dtypes import DTYPES
from moec.backends.reference.frame import Frame
from moec.ir import DenseFfn


class FastDense:
    """Runs one dense_ffn. Weights are read from the frame on each call; packed copies are this object's own."""

    device = "cpu"

    def __init__(self, op: DenseFfn) -> None:
        self.op = op
        self._activation, self._sizes = FastActivation(op), Sizes.of(op)
        self._packed = Packed()

    @property
    def nbytes_packed(self) -> int:
        """Bytes of packed copies."""
        return self._packed.nbytes

    def pack(self, at: Frame) -> None:
        """Copy the weights into the layout that is fastest here."""
        self._packed = pack(
            dense_layer(self.op, self._activation, self._sizes, at), DTYPES[self.op.x.type.dtype], machine()
        )

    def run(self, at: Frame) -> tuple[torch.Tensor, ...]:
        """The op's result for the frame's input x[..., D]."""
        x = at.tensor(self.op.x)
        layer = dense_layer(self.op, self._activation, self._sizes, at)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if rows.shape[0] == 0:
            return (x.new_zeros(*x.shape[:-1], self._sizes.width_out),)
        ways = Ways(machine(), self._packed.onednn)
        if ways.plain(layer, rows.dtype, rows.shape[0]):
            y = run_plain(layer.rows((0,))[0], self._activation, rows)
        else:
            y = run_one(layer, ways, 0, rows, rows.shape[0])
        return (y if x.dim() == 2 else y.reshape(*x.shape[:-1], self._sizes.width_out),)

    def describe(self) -> str:
        """The way it has, and what is packed."""
        return f"all rows at once{self._packed}"
