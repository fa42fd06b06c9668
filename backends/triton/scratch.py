"""The buffers of one call as one allocation: asking the allocator once costs the host less than asking five times."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

ALIGNED = 256
"""Bytes that divide each buffer's address, as they do the addresses of tensors of their own."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """One buffer's shape and element type; of no elements where it is not needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


class Scratch:
    """Several buffers in one allocation, which lives for as long as the call that made it."""

    def __init__(self, *buffers: Buffer) -> None:
        self.buffers = buffers
        self._offsets: list[int] = []
        self.nbytes = 0
        for buffer in buffers:
            self._offsets.append(self.nbytes)
            self.nbytes += -(-buffer.nbytes // ALIGNED) * ALIGNED

    def allocate(self, device: torch.device) -> torch.Tensor:
        """Memory for all buffers, of the current stream."""
        return torch.empty(self.nbytes, dtype=torch.uint8, device=device)

    def addresses(self, memory: torch.Tensor) -> list[int]:
        """Where each buffer lies."""
        start = memory.data_ptr()
        return [start + offset for offset in self._offsets]

    def apart(self, index: int, device: torch.device) -> torch.Tensor:
        """One buffer as memory of its own, for what outlives the call."""
        buffer = self.buffers[index]
        return torch.empty(buffer.shape, dtype=buffer.dtype, device=device)

    def view(self, memory: torch.Tensor, index: int) -> torch.Tensor:
        """One buffer as a tensor."""
        buffer, offset = self.buffers[index], self._offsets[index]
        return memory[offset : offset + buffer.nbytes].view(buffer.dtype).view(buffer.shape)
