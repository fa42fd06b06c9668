"""What a back end is: says per op whether it can, builds a region into an executable, and says what that will run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from moec.errors import MoecError, did_you_mean
from moec.ir import Op, Region

if TYPE_CHECKING:
    import torch

OpaqueGraph = Callable[..., "tuple[torch.Tensor, ...]"]
"""The user's own code behind an `opaque` op: takes its operands, returns its results."""

# Where each back end lives; a module is imported when its back end is first asked for.
BACKENDS: Mapping[str, str] = {
    "onnxruntime": "moec.backends.onnx",
    "reference": "moec.backends.reference",
    "triton": "moec.backends.triton",
}


class Weights(Protocol):
    """Where a region's weights come from; `moec.weights.WeightStore` is the one for live PyTorch modules.

    What it hands out are the user's own tensors, read anew on each call, and never copies.
    """

    def experts(self, ref: str) -> Sequence[torch.Tensor]:
        """One [N, C] matrix or [N] bias for each of the E experts."""
        ...

    def stacked(self, ref: str) -> torch.Tensor | None:
        """All experts as one [E, ...] view, or None where no such view exists."""
        ...

    def dense(self, ref: str) -> torch.Tensor:
        """A weight that is not per expert."""
        ...

    def placement(self) -> Hashable:
        """Changes when a weight is replaced or its memory is elsewhere, and not when it is written in place."""
        ...

    def version(self) -> Hashable:
        """Changes when a weight is replaced, moved, cast or written in place."""
        ...


class Executable(Protocol):
    """A region that runs.

    Results carry no graph: an executable computes as under `torch.no_grad()`, and gradients are the caller's business.
    Weights are read on each call, so writes to them are honoured; packed copies are checked against
    `Weights.version()` on each call and made anew when it changed.
    """

    @property
    def nbytes_packed(self) -> int:
        """Bytes of the copies of weights that it holds."""
        ...

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The region's outputs for its inputs."""
        ...

    def describe(self) -> str:
        """What it runs, one line for each step."""
        ...

    def refresh(self) -> None:
        """Make packed copies anew, after writes that `Weights.version()` does not see (`p.data`)."""
        ...


@runtime_checkable
class Tunes(Protocol):
    """An executable that can measure which of its kernels are fastest, and use those from then on."""

    def tune(self) -> None:
        """Measure what was not measured on this machine yet, and keep the results for other processes."""
        ...


@runtime_checkable
class Backend(Protocol):
    """Builds regions. Stateless; `load_backend` finds one by name."""

    @property
    def name(self) -> str:
        """As in `moec.compile(model, backend=...)`."""
        ...

    def supports(self, op: Op) -> str | None:
        """None where the op can be run, else the reason why not."""
        ...

    def build(
        self,
        region: Region,
        weights: Weights,
        opaques: Mapping[str, OpaqueGraph],
        *,
        pack: bool = False,
        graphs: bool = False,
    ) -> Executable:
        """The region over these weights; `opaques` holds the graphs its opaque ops name.

        `pack` allows a second copy of the weights in the layout that is fastest here, `graphs` CUDA graphs of its own
        where it has them. Raises MOEC403 for an op that `supports` refuses, MOEC406 for a graph that is missing.
        """
        ...


@runtime_checkable
class Differentiable(Protocol):
    """A back end that computes with torch's own operations, so that gradients are torch's business."""

    def differentiable(
        self, region: Region, weights: Weights, inputs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """The region's outputs, part of the autograd graph of its inputs and of what `weights` hands out."""
        ...


def load_backend(name: str) -> Backend:
    """The back end of this name, imported now. Raises MOEC401 for an unknown name."""
    if name not in BACKENDS:
        hint = did_you_mean(name, BACKENDS) or f"one of {', '.join(sorted(BACKENDS))}"
        raise MoecError("MOEC401", f'unknown back end "{name}"', hint=hint)
    found = import_module(BACKENDS[name]).backend()
    assert isinstance(found, Backend), f"{name} is no back end"
    return found


def check_ops(backend: Backend, region: Region) -> None:
    """Raise MOEC403 with the line and the reason for the first op that the back end cannot run."""
    for number, node in enumerate(region.nodes, start=2):
        reason = backend.supports(node.op)
        if reason is not None:
            where = f"line {number}: {node}"
            raise MoecError("MOEC403", f"{node.op.name}: back end {backend.name} cannot: {reason}", where=where)


def why_not(name: str, device: torch.device) -> str:
    """Why this back end cannot run layers on a device; empty if it can."""
    found: str = import_module(BACKENDS[name]).why_not(device)
    return found
