"""A layer of experts as the kernels take it: gate, up and down matrices of E experts, activation and sizes.

E experts, D model width, F expert width, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from moec.backends.reference.dtypes import DTYPES
from moec.backends.reference.joined import Experts
from moec.backends.triton.operands import (
    CannotPrepareError,
    Operands,
    Product,
    Stored,
    halves,
    one_expert,
    same_place,
    stored,
)
from moec.ir import DenseFfn, ExpertFfn

ELEMENTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Layer:
    """One fused op over live weights. `up` is None where the activation is not gated."""

    gate: Product
    up: Product | None
    down: Product
    activation: dict[str, Any]
    """The constants that kernels take: FN, ALPHA, LIMIT, AFTER, SHIFT, GATED."""
    dtype: torch.dtype
    experts: int
    d: int
    f: int
    o: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What the choice of kernels may depend on."""
        gate, down = self.gate.w, self.down.w
        turned = tuple(w.strides[0] == 1 and w.strides[1] != 1 for w in (gate, down))
        tma = gate.aligned and down.aligned and (self.up is None or self.up.w.aligned)
        listed = gate.listed > 0 or down.listed > 0
        return (self.experts, self.d, self.f, self.o, self.up is not None, self.dtype, gate.dtype, turned, tma, listed)


def layer_of(op: ExpertFfn | DenseFfn, operands: Operands, device: torch.device) -> Layer:
    """The layer of an op's weights. Raises CannotPrepareError, with the reason, where the kernels cannot read them."""
    dtype = DTYPES[op.x.type.dtype]
    if dtype not in ELEMENTS:
        raise CannotPrepareError(f"x holds {op.x.type.dtype}, the kernels know bf16, f16 and f32")
    if isinstance(op, DenseFfn):
        operands = _as_experts(operands)
    in_parts = (operands.w_in, operands.b_in, operands.scale_in)
    up = None
    if op.layout == "pair":
        assert operands.w_up is not None
        gate = _product(in_parts, device)
        up = _product((operands.w_up, operands.b_up, operands.scale_up), device)
    elif op.layout == "none":
        gate = _product(in_parts, device)
    else:
        pairs = [(None, None) if part is None else halves(part, op.layout) for part in in_parts]
        gate, up = (_product(tuple(pair[i] for pair in pairs), device) for i in (0, 1))
    down = _product((operands.w_out, operands.b_out, operands.scale_out), device)
    if up is not None:
        gate, up = _alike(gate, up, device)
    f, d = gate.w.shape
    constants = {
        "FN": op.fn,
        "ALPHA": float(op.alpha),
        "LIMIT": op.limit,
        "AFTER": op.clamp_after,
        "SHIFT": float(op.up_shift),
        "GATED": up is not None,
    }
    return Layer(gate, up, down, constants, dtype, gate.w.experts, d, f, down.w.shape[0])


def _as_experts(operands: Operands) -> Operands:
    found: dict[str, Any] = {name: one_expert(getattr(operands, name)) for name in Operands.__slots__}
    return Operands(**found)


def _product(parts: tuple[Experts | None, ...], device: torch.device) -> Product:
    w, b, scale = (None if part is None else stored(part, device) for part in parts)
    assert w is not None
    if w.dtype not in (*ELEMENTS, torch.int8):
        raise CannotPrepareError(f"weights hold {w.dtype}")
    if w.dtype == torch.int8 and scale is None:
        raise CannotPrepareError("int8 weights come without scales")
    return Product(w, b, scale)


def _alike(gate: Product, up: Product, device: torch.device) -> tuple[Product, Product]:
    """gate and up addressed alike: where one has a table of addresses and the other a stride, both get a table."""

    def pair(a: Stored | None, b: Stored | None) -> tuple[Stored | None, Stored | None]:
        if a is None or b is None or same_place(a, b):
            return a, b
        a, b = (_as_table(part, device) for part in (a, b))
        listed = max(a.listed, b.listed)
        a, b = (replace(part, listed=listed) for part in (a, b))
        if not same_place(a, b):
            raise CannotPrepareError("gate and up differ in shape, strides or element type")
        return a, b

    (w, w_up), (b, b_up), (s, s_up) = (
        pair(one, other) for one, other in ((gate.w, up.w), (gate.b, up.b), (gate.scale, up.scale))
    )
    assert w is not None
    assert w_up is not None
    return Product(w, b, s), Product(w_up, b_up, s_up)


def _as_table(part: Stored, device: torch.device) -> Stored:
    if part.listed:
        return part
    step = part.stride * part.dtype.itemsize
    at = [part.base.data_ptr() + e * step for e in range(part.experts)]
    table = torch.tensor(at, dtype=torch.int64, device=device)
    return replace(part, base=table, listed=1 if all(a % 16 == 0 for a in at) else 2, stride=0)
