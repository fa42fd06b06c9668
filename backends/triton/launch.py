"""One kernel with its constants: compiled at the first launch, launched from then on without Triton's dispatcher."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import copy_context
from typing import Any

import torch
import triton


class Launch:
    """A kernel ready to be launched on one device.

    Arguments come in the kernel's own order, constants last. Every tensor argument that the kernel may assume to be
    aligned must be so at each launch: what the first launch was compiled for holds for all. Once `ready`, addresses
    do for tensors: the launcher then neither asks a tensor for its address nor the driver what lies there. `scratch`
    is for kernels that make descriptors.
    """

    def __init__(
        self,
        kernel: Any,
        constants: dict[str, Any],
        *,
        warps: int,
        stages: int,
        pdl: bool = False,
        scratch: bool = False,
    ) -> None:
        self.kernel, self.constants = kernel, constants
        self._scratch = scratch
        self.options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        if pdl:
            self.options["launch_pdl"] = True
        names = kernel.arg_names
        assert names[-len(constants) :] == list(constants), f"constants of {kernel} in another order"
        self._tail = tuple(constants.values())
        self._compiled: Any = None

    @property
    def ready(self) -> bool:
        """Whether the kernel is compiled; never in the interpreter."""
        return self._compiled is not None

    def __call__(self, stream: int, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch on a stream, which is the current one; compiles the first time."""
        if self._scratch:
            # In a context of its own, so that an allocator of the user's stays in place.
            copy_context().run(self._launch_with_scratch, stream, grid, *args)
        else:
            self._launch(stream, grid, *args)

    def _launch_with_scratch(self, stream: int, grid: tuple[int, int, int], *args: Any) -> None:
        triton.set_allocator(scratch_memory)
        self._launch(stream, grid, *args)

    def _launch(self, stream: int, grid: tuple[int, int, int], *args: Any) -> None:
        compiled = self._compiled
        if compiled is not None:
            # What `compiled[grid](*args)` does, less looking up device and stream, which takes longer than the rest.
            function, metadata = compiled.function, compiled.packed_metadata
            compiled.run(*grid, stream, function, metadata, None, None, None, *args, *self._tail)
            return
        args = tuple(arg.tensor if isinstance(arg, Fixed) else arg for arg in args)
        found = self.kernel[grid](*args, **self.constants, **self.options)
        if isinstance(found, triton.compiler.CompiledKernel):
            self._compiled = found


def scratch_memory(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for what a kernel makes itself, such as descriptors, on the current device and stream."""
    del alignment, stream  # which torch's allocator exceeds, and the current one
    return torch.empty(size, dtype=torch.int8, device="cuda")


class Fixed(int):
    """The address of a tensor that stays where it is: cheaper to pass than the tensor."""

    tensor: torch.Tensor

    @classmethod
    def at(cls, tensor: torch.Tensor | None) -> Fixed | None:
        """The address of a tensor, or None for none."""
        if tensor is None:
            return None
        fixed = cls(tensor.data_ptr())
        fixed.tensor = tensor
        return fixed


class AllReady:
    """Whether all of several launches are ready, asked at each call and cheap once they are."""

    def __init__(self, launches: Iterable[Launch]) -> None:
        self._waiting = list(launches)

    def __bool__(self) -> bool:
        if self._waiting:
            self._waiting = [launch for launch in self._waiting if not launch.ready]
        return not self._waiting


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor lies, for a launch that is ready; None for none."""
    return None if tensor is None else tensor.data_ptr()


def current_stream(device: torch.device) -> int:
    """The handle of the device's current stream; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    return int(triton.runtime.driver.active.get_current_stream(device.index))
