"""The weights of an ONNX file as a region's weights. E experts, N outputs, C inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

DTYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
Bank = torch.Tensor | tuple[torch.Tensor, ...]
"""[E, ...], or one tensor for each expert."""


class FileWeights:
    """Weights that never change: those of a file."""

    def __init__(self, banks: Mapping[str, Bank], dtype: str = "f32") -> None:
        self.banks, self._dtype = dict(banks), DTYPES[dtype]

    def experts(self, ref: str) -> Sequence[torch.Tensor]:
        """One [N, C] matrix or [N] bias for each expert."""
        bank = self.banks[ref]
        return [one.to(self._dtype) for one in (bank if isinstance(bank, tuple) else bank.unbind(0))]

    def stacked(self, ref: str) -> torch.Tensor | None:
        """All experts as one [E, ...] view, or None where they lie apart."""
        bank = self.banks[ref]
        return None if isinstance(bank, tuple) else bank.to(self._dtype)

    def dense(self, ref: str) -> torch.Tensor:
        """A weight that is not per expert."""
        bank = self.banks[ref]
        assert isinstance(bank, torch.Tensor)
        return bank.to(self._dtype)

    def placement(self) -> int:
        return 0

    def version(self) -> int:
        return 0
