"""What a choice of kernels depends on about a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One GPU. `interpreted` stands for Triton's interpreter on the CPU, which knows neither TMA nor launch order."""

    name: str
    capability: tuple[int, int]
    processors: int
    """Streaming multiprocessors."""
    l2_bytes: int
    shared_bytes: int
    """The most shared memory one program may have."""
    interpreted: bool = False

    @property
    def hopper(self) -> bool:
        """Whether it has TMA, programmatic dependent launch, and shared memory for the tiles that go with them."""
        return self.capability >= (9, 0) and self.shared_bytes >= 200 << 10


INTERPRETER = GpuFacts("interpreter", (9, 0), 4, 50 << 20, 227 << 10, interpreted=True)


@lru_cache
def gpu_facts(device: torch.device) -> GpuFacts:
    """The facts of a CUDA device; the interpreter's for the CPU."""
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    return GpuFacts(
        found.name,
        (found.major, found.minor),
        found.multi_processor_count,
        found.L2_cache_size,
        int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)),
    )
