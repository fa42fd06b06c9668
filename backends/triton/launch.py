"""One kernel with its constants: compiled at the first launch, launched from then on without Triton's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton


class Launch:
    """A kernel ready to be launched on one device.

    Arguments come in the kernel's own order, constants last. Every tensor argument that the kernel may assume to be
    aligned must be so at each launch: what the first launch was compiled for holds for all.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], *, warps: int, stages: int, pdl: bool = False) -> None:
        self.kernel, self.constants = kernel, constants
        self.options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        if pdl:
            self.options["launch_pdl"] = True
        names = kernel.arg_names
        assert names[-len(constants) :] == list(constants), f"constants of {kernel} in another order"
        self._tail = tuple(constants.values())
        self._compiled: Callable[[tuple[int, int, int]], Callable[..., None]] | None = None

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch on the current stream; compiles the first time."""
        if self._compiled is not None:
            self._compiled(grid)(*args, *self._tail)
            return
        found = self.kernel[grid](*args, **self.constants, **self.options)
        if isinstance(found, triton.compiler.CompiledKernel):
            self._compiled = found.__getitem__
