"""Experts' parameters brought together: objects, shapes and values stay, the memory becomes a part of one piece.

Kernels that reach all experts by one stride are faster than those that look an address up for each. E experts.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from moec.weights import View, WeightStore

_ALIGNED = 16
"""Bytes that every expert's memory starts at a multiple of."""


@dataclass(frozen=True)
class Gathered:
    """What was moved."""

    moved: int = 0
    """Bytes of the parameters that lie in new memory now; their old memory is given back."""
    extra: int = 0
    """The most bytes that were held twice at a time."""
    left: tuple[str, ...] = ()
    """Why parameters stayed where they were, by weight."""

    def __str__(self) -> str:
        said = f"{self.moved:,} bytes of experts' parameters were brought together, their old memory is free"
        return "; ".join((said if self.moved else "no experts' parameters had to be brought together", *self.left))


def gather_experts(store: WeightStore, others: Iterable[torch.Tensor]) -> Gathered:
    """Bring the experts of each weight of the store together. `others` are all tensors that may share their memory."""
    owners = Counter(t.untyped_storage().data_ptr() for t in {id(t): t for t in others}.values())
    found, left = Gathered(), []
    for name, entry in store.views.items():
        if not isinstance(entry, tuple) or len(entry) < 2 or store.stacked(name) is not None:
            continue
        params = [store.param(view.param) for view in entry]
        if _even(params):
            continue
        why = _why_not(entry, params, owners)
        if why:
            left.append(f"{name!r} stays where it is: {why}")
            continue
        size = _gather(params)
        found = Gathered(found.moved + size, max(found.extra, size))
    return Gathered(found.moved, found.extra, tuple(left))


def _why_not(views: Sequence[View], params: Sequence[torch.Tensor], owners: Counter[int]) -> str:
    first = params[0]
    if len({id(p) for p in params}) < len(params):
        return "several experts lie in one parameter"
    if any(v.offset or v.shape != tuple(p.shape) or v.stride != p.stride() for v, p in zip(views, params, strict=True)):
        return "experts are parts of parameters"
    if any(
        (p.shape, p.stride(), p.dtype, p.device) != (first.shape, first.stride(), first.dtype, first.device)
        for p in params
    ):
        return "experts differ in shape, strides, element type or device"
    if any(p.untyped_storage().nbytes() != p.nbytes or owners[p.untyped_storage().data_ptr()] > 1 for p in params):
        return "their memory is shared with other tensors"
    return ""


def _even(params: Sequence[torch.Tensor]) -> bool:
    """Whether the experts lie one after the other already, evenly spaced."""
    at = [p.data_ptr() for p in params]
    gaps = {b - a for a, b in itertools.pairwise(at)}
    return len(gaps) == 1 and gaps.pop() >= params[0].nbytes


def _gather(params: Sequence[torch.Tensor]) -> int:
    """Move the parameters, one after the other, each giving its old memory back; the bytes of the new memory."""
    first = params[0]
    whole = _ALIGNED // math.gcd(_ALIGNED, first.itemsize)
    step = -(-first.numel() // whole) * whole
    memory = torch.empty(step * len(params), dtype=first.dtype, device=first.device)
    for e, p in enumerate(params):
        place = memory.as_strided(p.shape, p.stride(), e * step)
        place.copy_(p.detach())
        p.data = place
    return memory.nbytes
