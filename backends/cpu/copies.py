"""Bringing scattered experts of one tensor together, so that one batched product can take them.

E experts, N outputs, C inputs, n picked experts.
"""

from __future__ import annotations

import torch

from moec.backends.cpu.scratch import scratch
from moec.backends.cpu.slots import Ints

# index_select gives whole slices to its threads as long as they are shorter than this many elements; longer ones it
# cuts up among all threads.
SLICE_ELEMENTS = 2**14


def copy_experts(w: torch.Tensor, experts: Ints) -> torch.Tensor:
    """w[E, N, C], experts[n] -> [n, N, C]: a copy in a buffer, each matrix lying as it lies in w.

    Matrices are copied in short slices. Then each core copies a contiguous part of the result, which is the part that a
    batched product gives it to read: the copy is in that core's own cache. Cut the other way, cores read what others
    wrote, and that costs several times the copy itself.
    """
    if w.stride(1) == 1 and w.stride(2) != 1:
        return copy_experts(w.transpose(1, 2), experts).transpose(1, 2)
    _, rows, columns = w.shape
    result = scratch("matrices", (experts.size, rows, columns), w.dtype)
    slices = _slices(w)
    index = torch.from_numpy(experts)
    if slices == 0:
        return torch.index_select(w, 0, index, out=result)
    length = rows * columns // slices
    step = w.stride(0) // length
    source = w.as_strided(((w.shape[0] - 1) * step + slices, length), (length, 1))
    index = (index.unsqueeze(1) * step + torch.arange(slices, device="cpu")).view(-1)
    torch.index_select(source, 0, index, out=result.view(-1, length))
    return result


def _slices(w: torch.Tensor) -> int:
    """Into how many equal slices to cut a matrix of w[E, N, C]; 0 where it cannot be cut."""
    _, rows, columns = w.shape
    if w.stride(2) != 1 or w.stride(1) != columns:
        return 0
    slices = 1
    while rows * columns > slices * SLICE_ELEMENTS:
        slices *= 2
    length = rows * columns // slices
    even = rows * columns % slices == 0 and length > 0 and w.stride(0) % length == 0
    return slices if even and w.stride(0) >= rows * columns else 0
