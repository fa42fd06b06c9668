"""Where tensors lie in their storage, and whether two of one storage can have a byte in common."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Extent:
    """Where in its storage a tensor lies, in bytes: runs of `size` that start at `first` plus multiples of `step`."""

    first: int
    last: int
    step: int
    size: int

    @staticmethod
    def of(tensor: torch.Tensor) -> Extent:
        """The tensor's own."""
        width = tensor.element_size()
        first = int(tensor.storage_offset()) * width
        if not tensor.numel():
            return Extent(first, first, 0, width)
        size, steps = width, []
        for stride, count in sorted((s * width, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            if stride <= size:
                size += stride * (count - 1)
            elif count > 1:
                steps.append(stride)
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) * width + width
        return Extent(first, first + last, math.gcd(*steps), size)

    def meets(self, other: Extent) -> bool:
        """Whether a byte may be in both; interleaved runs are told apart by what their steps have in common."""
        empty = self.first == self.last or other.first == other.last
        if empty or self.first >= other.last or other.first >= self.last:
            return False
        step = math.gcd(self.step, other.step)
        if not step:
            return True
        apart = (other.first - self.first) % step
        return apart < self.size or step - apart < other.size
