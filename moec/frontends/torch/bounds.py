"""Indices out of bounds on a GPU, found before the kernel that would read them.

A CPU raises IndexError for them, and a probe that does not fit a module may well lead there. A GPU's kernel stops the
whole process's work with the device instead, so while a run is observed the indices are looked at first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose second argument lists an index (or None) for each dimension.
_BY_LIST = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"})
# (self, dim, index, ...): indices of this dimension of self.
_BY_DIM = frozenset(
    {
        "index_select",
        "gather",
        "take_along_dim",
        *(
            name + end
            for name in ("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy")
            for end in ("", "_")
        ),
        *("index_fill", "index_fill_"),
    }
)
# Which of them count from the end for negative numbers.
_FROM_THE_END = _BY_LIST


def check_indices(func: Any, args: Sequence[Any]) -> None:
    """Raise IndexError, as the CPU does, for an ATen call on a GPU whose indices are out of bounds; waits for it."""
    name = func.overloadpacket.__name__
    for index, size in _indices(name, args):
        if index.numel() == 0 or index.dtype in (torch.bool, torch.uint8):
            continue
        low, high = torch.aminmax(index)
        least = -size if name in _FROM_THE_END else 0
        if int(low) < least or int(high) >= size:
            wrong = int(high) if int(high) >= size else int(low)
            raise IndexError(f"index {wrong} is out of bounds for dimension with size {size}")


class Bounded(TorchDispatchMode):
    """While it lasts, indices out of bounds raise IndexError on a GPU, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if on_gpu(args):
            check_indices(func, args)
        return func(*args, **(kwargs or {}))


def on_gpu(args: Sequence[Any]) -> bool:
    """Whether a call's first tensor is on a GPU."""
    return bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_cuda


def _indices(name: str, args: Sequence[Any]) -> Iterator[tuple[torch.Tensor, int]]:
    """Index tensors and the sizes of the dimensions that they are for."""
    if name in _BY_LIST:
        dim = 0
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                dim += index.dim()  # a mask covers as many dimensions as it has
                continue
            if index is not None:
                yield index, args[0].shape[dim]
            dim += 1
    elif name in _BY_DIM and isinstance(args[1], int) and isinstance(args[2], torch.Tensor) and args[0].dim():
        yield args[2], args[0].shape[args[1]]
    elif name == "embedding":
        yield args[1], args[0].shape[0]
