"""The weights of an ONNX file as a region's weights. E experts, N outputs, C inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Bank = torch.Tensor | tuple[torch.Tensor, ...]
"""[E, ...], or one tensor for each expert."""


class FileWeights:
    """Weights that never change: those of a file."""

    def __init__(self, banks: Mapping[str, Bank]) -> None:
        self.banks = dict(banks)

    def experts(self, ref: str) -> Sequence[torch.Tensor]:
        """One [N, C] matrix or [N] bias for each expert."""
        bank = self.banks[ref]
        return bank if isinstance(bank, tuple) else bank.unbind(0)

    def stacked(self, ref: str) -> torch.Tensor | None:
        """All experts as one [E, ...] view, or None where they lie apart."""
        bank = self.banks[ref]
        return None if isinstance(bank, tuple) else bank

    def dense(self, ref: str) -> torch.Tensor:
        """A weight that is not per expert."""
        bank = self.banks[ref]
        assert isinstance(bank, torch.Tensor)
        return bank

    def placement(self) -> int:
        return 0

    def version(self) -> int:
        return 0
