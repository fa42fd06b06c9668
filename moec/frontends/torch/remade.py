"""Example inputs that can be made again, without keeping the user's tensors alive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moec.trees import tree_map


@dataclass(frozen=True)
class _Numbers:
    """Of a tensor of floating point numbers, everything but the numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.shape, generator=generator).to(self.device, self.dtype)


class Remade:
    """Tensors of floating point numbers are made anew, at random; indices, masks and everything else are kept."""

    def __init__(self, example: Any) -> None:
        self._kept = tree_map(_forget, example)

    def make(self) -> Any:
        """Example inputs of the same structure, None where there were none."""
        return tree_map(lambda leaf: leaf.make() if isinstance(leaf, _Numbers) else leaf, self._kept)


def _forget(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
        return _Numbers(tuple(leaf.shape), leaf.dtype, leaf.device)
    return leaf
