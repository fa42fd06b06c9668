"""Packing: experts that are a tensor each, copied into one piece of memory, where kernels reach them by a stride.

E experts. What lies evenly already is left where it is: no other layout is faster.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from moec.backends.reference.joined import Experts, Joined
from moec.backends.triton.operands import Operands


def pack(operands: Operands) -> Operands:
    """The operands with scattered experts copied together."""
    parts: dict[str, Any] = {}
    for role in Operands.__slots__:
        w = getattr(operands, role)
        parts[role] = None if w is None else _packed(w)
    return Operands(**parts)


def bytes_to_pack(operands: Operands) -> int:
    """The bytes of the copies that `pack` makes."""
    return sum(_bytes(w) for role in Operands.__slots__ for w in [getattr(operands, role)] if w is not None)


def _packed(w: Experts) -> Experts:
    if isinstance(w, torch.Tensor):
        return w
    if isinstance(w, Joined):
        return Joined([_packed(part) for part in w.parts], w.axis)
    tensors = [w[e] for e in range(len(w))]
    if not _scattered(tensors):
        return w
    first = tensors[0]
    memory = first.new_empty(_step(first) * len(tensors))
    steps = (_step(first), *first.stride())
    packed = memory.as_strided((len(tensors), *first.shape), steps)
    for e, tensor in enumerate(tensors):
        packed[e].copy_(tensor)
    return packed


def _bytes(w: Experts) -> int:
    if isinstance(w, torch.Tensor):
        return 0
    if isinstance(w, Joined):
        return sum(map(_bytes, w.parts))
    tensors = [w[e] for e in range(len(w))]
    return _step(tensors[0]) * len(tensors) * tensors[0].element_size() if _scattered(tensors) else 0


def _scattered(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether there is no one step between experts, though they are all alike."""
    first = tensors[0]
    alike = all((t.shape, t.stride(), t.dtype) == (first.shape, first.stride(), first.dtype) for t in tensors)
    steps = {b.data_ptr() - a.data_ptr() for a, b in itertools.pairwise(tensors)}
    even = len(steps) == 1 and min(steps) > 0 and min(steps) % first.element_size() == 0
    return alike and len(tensors) > 1 and not even


def _step(one: torch.Tensor) -> int:
    """Elements from one expert to the next: each starts at a multiple of 16 bytes, as TMA wants it."""
    size = 1 + sum((n - 1) * s for n, s in zip(one.shape, one.stride(), strict=True))
    whole = 16 // math.gcd(16, one.element_size())
    return -(-size // whole) * whole
