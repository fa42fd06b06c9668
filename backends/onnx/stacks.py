"""Weights of all experts as one initializer, made when the file is written: stacked, or rounded in blocks.

E experts, N outputs, C inputs, B blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from moec.backends.onnx.emitter import DTYPES, Emitter
from moec.backends.reference.dtypes import DTYPES as TORCH_DTYPES

Matrix = Callable[[], torch.Tensor]
"""One expert's matrix [N, C] or bias [N], read when it is called."""


def stacked(emit: Emitter, name: str, experts: Sequence[Matrix], dtype: str) -> Any:
    """[E, N, C] or [E, N] in an element type of the IR."""

    def make() -> Any:
        return TorchTensor(torch.stack([one().detach().to(TORCH_DTYPES[dtype]).cpu() for one in experts]))

    return emit.lazy(name, make, DTYPES[dtype], (len(experts), *experts[0]().shape))


def rounded_in_blocks(
    emit: Emitter, name: str, experts: Sequence[Matrix], dtype: str, *, bits: int, block: int
) -> tuple[Any, Any]:
    """uint8[E, N, C * bits / 8] around 2^(bits-1), and the scales of `block` weights each, [E, N, C / block]."""

    def make_bytes() -> Any:
        return ir.Tensor(np.stack([pack(one(), scale_of(one()), bits) for one in experts]))

    def make_scales() -> Any:
        return TorchTensor(torch.stack([scale_of(one()).cpu() for one in experts]))

    def scale_of(matrix: torch.Tensor) -> torch.Tensor:
        return scales(matrix, bits, block).to(TORCH_DTYPES[dtype])

    n, c = experts[0]().shape
    q = emit.lazy(f"{name}.weight", make_bytes, ir.DataType.UINT8, (len(experts), n, c * bits // 8))
    return q, emit.lazy(f"{name}.scale", make_scales, DTYPES[dtype], (len(experts), n, c // block))


def scales(matrix: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """[N, C] -> f32[N, C / block]: the largest weight of a block becomes the largest whole number."""
    parts = matrix.detach().float().unflatten(1, (-1, block))
    found: torch.Tensor = parts.abs().amax(-1) / (2 ** (bits - 1) - 1)
    return found


def pack(matrix: torch.Tensor, factors: torch.Tensor, bits: int) -> Any:
    """[N, C] and its scales[N, B] -> uint8[N, C * bits / 8]; of two numbers of 4 bits the first is the lower half."""
    most = 2 ** (bits - 1) - 1
    parts = matrix.detach().float().unflatten(1, (factors.shape[1], -1))
    whole = torch.where(factors == 0, 1.0, factors.float()).unsqueeze(-1)
    q = ((parts / whole).round().clamp(-most, most) + most + 1).to(torch.uint8).flatten(1)
    if bits == 4:
        q = q[:, 0::2] | (q[:, 1::2] << 4)
    return q.cpu().numpy()
