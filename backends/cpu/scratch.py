"""Buffers that are used again from call to call: memory that was touched before is several times faster than new.

Each thread has its own, shared by all layers, so a model of many layers holds one set. A buffer never leaves a call.
"""

from __future__ import annotations

import threading
from math import prod

import torch

# Larger requests are served by new memory: a buffer stays for the life of its thread.
MAX_BYTES = 64 * 2**20
# The allocator hands small memory out again and again by itself, and sooner than a view of a buffer can be made.
MIN_BYTES = 64 * 2**10


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_use: dict[tuple[str, torch.dtype], torch.Tensor] = {}


_buffers = _Buffers()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor of this shape; what the last user of the same name and dtype wrote is gone."""
    size = prod(shape)
    if size * dtype.itemsize <= MIN_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    found = _buffers.by_use.get((name, dtype))
    if found is None or found.numel() < size:
        if size * dtype.itemsize > MAX_BYTES:
            return torch.empty(shape, dtype=dtype, device="cpu")
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            found = _buffers.by_use[name, dtype] = torch.empty(size, dtype=dtype, device="cpu")
    return found[:size].view(shape)
