"""Which sizes of a model's inputs may change: those at which the model itself still runs when they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moec.exporter.probes import sampled

Run = Callable[[Sequence[torch.Tensor]], Any]
# 1 is no example of a size: much that a model adds or multiplies broadcasts then.
STEPS = (1, 4)


def dynamic_axes(run: Run, tensors: Sequence[torch.Tensor]) -> list[frozenset[int]]:
    """For each tensor the axes whose size may change. Tensors of equal size along an axis change together."""
    found: list[set[int]] = [set() for _ in tensors]
    for axis in range(max((tensor.dim() for tensor in tensors), default=0)):
        for size in {tensor.shape[axis] for tensor in tensors if tensor.dim() > axis}:
            alike = [i for i, tensor in enumerate(tensors) if tensor.dim() > axis and tensor.shape[axis] == size]
            groups = [alike, *([i] for i in alike if len(alike) > 1)]
            changing = next((group for group in groups if _runs(run, tensors, group, axis)), [])
            for i in changing:
                found[i].add(axis)
    return [frozenset(axes) for axes in found]


def _runs(run: Run, tensors: Sequence[torch.Tensor], group: Sequence[int], axis: int) -> bool:
    """Whether the model runs with more along this axis of these tensors."""
    for step in STEPS:
        changed = list(tensors)
        for i in group:
            shape = list(tensors[i].shape)
            shape[axis] += step
            changed[i] = sampled(tensors[i], shape)
        try:
            run(changed)
        except Exception:  # whatever the user's model raises, it does not take this size
            return False
    return True
