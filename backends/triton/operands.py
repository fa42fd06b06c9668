"""The weights of a fused op as kernels see them: two or three matrices per expert, read where they lie.

E experts, N outputs, C inputs, F expert width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moec.backends.reference.joined import Experts, Joined, shape_of, whole


class CannotPrepareError(ValueError):
    """These operands cannot be run by these kernels; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Operands:
    """An op's weights by role, each [E, ...] or E tensors or joined ones; without E for a dense_ffn."""

    w_in: Experts
    w_out: Experts
    w_up: Experts | None = None
    b_in: Experts | None = None
    b_out: Experts | None = None
    b_up: Experts | None = None
    scale_in: Experts | None = None
    scale_out: Experts | None = None
    scale_up: Experts | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """E equal tensors: `base` is what kernels get, the first expert's memory or with `listed` a table of addresses."""

    base: torch.Tensor
    listed: int
    """0: one stride between experts; 1: a table of addresses that 16 divides; 2: a table of any addresses."""
    stride: int
    """Elements from one expert to the next."""
    shape: tuple[int, ...]
    """Of one expert: (N, C) or (N,)."""
    strides: tuple[int, ...]
    """Of one expert, in elements."""
    dtype: torch.dtype
    held: tuple[torch.Tensor, ...]
    """The tensors, so that the addresses stay theirs."""

    @property
    def experts(self) -> int:
        """E."""
        return len(self.held) if len(self.held) > 1 else self.held[0].shape[0]

    @property
    def aligned(self) -> bool:
        """Whether every row starts at a multiple of 16 bytes and its elements lie side by side: what TMA needs."""
        outer, inner = sorted(self.strides, reverse=True)
        size = self.dtype.itemsize
        if inner != 1 or outer <= 1 or (outer * size) % 16:
            return False
        if self.listed:
            return self.listed == 1
        return (self.stride * size) % 16 == 0 and self.stride > 0 and self.base.data_ptr() % 16 == 0


@dataclass(frozen=True, slots=True)
class Product:
    """One product's weights w[E, N, C], bias b[E, N]? and scales[E, N]? of int8 weights."""

    w: Stored
    b: Stored | None
    scale: Stored | None


def stored(source: Experts, device: torch.device) -> Stored:
    """A tensor [E, ...] or E tensors, on `device`. Raises CannotPrepareError where they differ in shape or strides."""
    if isinstance(source, torch.Tensor):
        _require_device([source], device)
        one = source[0]
        return Stored(source, 0, source.stride(0), tuple(one.shape), one.stride(), one.dtype, (source,))
    tensors = [source[e] for e in range(len(source))]
    _require_device(tensors, device)
    first = tensors[0]
    if any(t.shape != first.shape or t.stride() != first.stride() or t.dtype != first.dtype for t in tensors):
        raise CannotPrepareError("the experts' weights differ in shape, strides or element type")
    if len(tensors) == 1:
        return stored(first.unsqueeze(0), device)
    at = [t.data_ptr() for t in tensors]
    gap = at[1] - at[0]
    shape, strides = tuple(first.shape), first.stride()
    if gap > 0 and gap % first.element_size() == 0 and all(b - a == gap for a, b in itertools.pairwise(at)):
        return Stored(first, 0, gap // first.element_size(), shape, strides, first.dtype, tuple(tensors))
    table = torch.tensor(at, dtype=torch.int64, device=device)
    listed = 1 if all(address % 16 == 0 for address in at) else 2
    return Stored(table, listed, 0, shape, strides, first.dtype, tuple(tensors))


def _require_device(tensors: Sequence[torch.Tensor], device: torch.device) -> None:
    for t in tensors:
        if t.device != device:
            raise CannotPrepareError(f"weights are on {t.device}, the layer runs on {device}")


def halves(source: Experts, layout: str) -> tuple[Experts, Experts]:
    """gate and up of [E, 2F, ...] that holds both, as views. Raises CannotPrepareError where that takes a copy."""
    if isinstance(source, Joined) and source.axis == 1:
        rows = [shape_of(part)[1] for part in source.parts]
        if len(rows) != 2 or rows[0] != rows[1] or not layout.startswith("concat"):
            raise CannotPrepareError(f"gate and up are joined from parts of {rows} rows")
        first, second = source.parts
    elif isinstance(source, Joined) and source.axis == 2:
        raise CannotPrepareError("weights are joined along their inputs")
    elif isinstance(source, torch.Tensor):
        first, second = _views(source, layout, 1)
    else:
        pairs = [_views(source[e], layout, 0) for e in range(len(source))]
        first, second = [a for a, _ in pairs], [b for _, b in pairs]
    return (second, first) if layout.endswith("up_first") else (first, second)


def _views(both: torch.Tensor, layout: str, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    if layout.startswith("interleaved"):
        step = both.shape[axis]
        return tuple(both[(slice(None),) * axis + (slice(i, step, 2),)] for i in (0, 1))  # type: ignore[return-value]
    first, second = both.chunk(2, dim=axis)
    return first, second


def one_expert(source: Experts | None) -> Experts | None:
    """A dense weight as that of one expert; joined weights stay apart."""
    if source is None or (isinstance(source, Joined) and source.axis > 1):
        return None if source is None else whole(source).unsqueeze(0)
    if isinstance(source, Joined):
        parts = [one_expert(part) for part in source.parts]
        return Joined([part for part in parts if part is not None], source.axis + 1)
    return (source if isinstance(source, torch.Tensor) else torch.stack(list(source))).unsqueeze(0)


def same_place(a: Stored | None, b: Stored | None) -> bool:
    """Whether two matrices are addressed alike, so that one set of strides does for both."""
    if a is None or b is None:
        return a is b
    return (a.listed, a.stride, a.shape, a.strides, a.dtype) == (b.listed, b.stride, b.shape, b.strides, b.dtype)
