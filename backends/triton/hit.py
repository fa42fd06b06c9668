"""Which experts have tokens, known on the host by the time that a backward asks."""

from __future__ import annotations

import torch

from moec.backends.triton.kernels.group import OFFSETS


class HitExperts:
    """The grouping's offsets, copied to the host behind the kernels that made them; nothing waits for the copy."""

    def __init__(self, meta: torch.Tensor, experts: int) -> None:
        offsets = meta[OFFSETS : OFFSETS + experts + 1]
        self._event: torch.cuda.Event | None = None
        if not meta.is_cuda:
            self._offsets = offsets.clone()
            return
        self._offsets = torch.empty(experts + 1, dtype=torch.int32, pin_memory=True)
        self._offsets.copy_(offsets, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def empty(self) -> frozenset[int]:
        """Numbers of the experts without tokens."""
        if self._event is not None:
            self._event.synchronize()
        offsets = self._offsets.tolist()
        return frozenset(e for e in range(len(offsets) - 1) if offsets[e] == offsets[e + 1])
