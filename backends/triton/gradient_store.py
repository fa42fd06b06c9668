"""Where the gradients of a region's weights go: memory of their own, laid out like the parameters.

Parameters of the same form that hold one expert each get their gradients in one piece of memory, so that kernels reach
them by a stride and need no table of addresses. E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moec.weights import View, WeightStore


@dataclass(frozen=True, slots=True)
class _Piece:
    """Parameters whose gradients share memory, `step` elements apart."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    step: int
    dtype: torch.dtype
    covered: bool
    """Whether the views cover every element, so that nothing need be cleared."""


class GradientStore:
    """Makes memory for the gradients of a store's parameters."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        used: dict[str, int] = {}
        for entry in store.views.values():
            for view in entry if isinstance(entry, tuple) else (entry,):
                used[view.param] = used.get(view.param, 0) + math.prod(view.shape)
        self._pieces: list[_Piece] = []
        placed: set[str] = set()
        for entry in store.views.values():
            for names in self._groups(entry):
                new = tuple(name for name in names if name not in placed)
                placed.update(new)
                if new:
                    self._pieces.append(self._piece(new, used))

    def _groups(self, entry: View | tuple[View, ...]) -> list[tuple[str, ...]]:
        names = tuple(dict.fromkeys(view.param for view in (entry if isinstance(entry, tuple) else (entry,))))
        forms = {self._form(name) for name in names}
        return [names] if len(forms) == 1 else [(name,) for name in names]

    def _form(self, name: str) -> tuple[object, ...]:
        p = self._store.param(name)
        return tuple(p.shape), p.stride(), p.dtype

    def _piece(self, names: tuple[str, ...], used: Mapping[str, int]) -> _Piece:
        p = self._store.param(names[0])
        shape, strides = tuple(p.shape), p.stride()
        size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        # Each starts at a multiple of 16 bytes, as a tensor of its own would.
        whole = 16 // math.gcd(16, p.dtype.itemsize)
        step = size if len(names) == 1 else -(-size // whole) * whole
        covered = all(used[name] == p.numel() for name in names) and size == p.numel()
        return _Piece(names, shape, strides, step, p.dtype, covered)

    def why_not(self) -> str:
        """Why gradients cannot be written by kernels; empty if they can."""
        for piece in self._pieces:
            if any(stride <= 0 and n > 1 for n, stride in zip(piece.shape, piece.strides, strict=True)):
                return f"elements of weight {piece.names[0]!r} share memory"
        return ""

    def make(self, names: frozenset[str], device: torch.device) -> dict[str, torch.Tensor]:
        """Memory for the gradients of at least these parameters, by name; zeros where no view of a weight is."""
        found: dict[str, torch.Tensor] = {}
        for piece in self._pieces:
            if names.isdisjoint(piece.names):
                continue
            make = torch.empty if piece.covered else torch.zeros
            memory = make(piece.step * len(piece.names), dtype=piece.dtype, device=device)
            for i, name in enumerate(piece.names):
                found[name] = memory.as_strided(piece.shape, piece.strides, i * piece.step)
        return found
