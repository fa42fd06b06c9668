"""Where faster ways to run an op plug in: what they offer, and how they are asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from moec.backends.reference.frame import Frame
from moec.ir import Op


class Fast(Protocol):
    """One op of a region, run in another way than by its meaning; asked only for tensors on `device`.

    It is right for every frame that the op's types allow, and reads weights from the frame on each call. Copies of them
    it makes in `pack` and nowhere else, and puts in place by one assignment: calls may run at the same time.
    """

    device: str
    """The type of the device whose tensors it takes, such as "cpu"; on others the op runs by its meaning."""

    @property
    def nbytes_packed(self) -> int:
        """Bytes of the copies of weights that it holds; while there are any, `pack` is called when weights change."""
        ...

    def pack(self, at: Frame) -> None:
        """Make copies anew from the weights in the frame, which has no inputs; called only where copies are allowed."""
        ...

    def run(self, at: Frame) -> Sequence[torch.Tensor]:
        """The op's results for the values in the frame."""
        ...

    def describe(self) -> str:
        """What it does, in one line."""
        ...


Planner = Callable[[Op], Fast | None]
"""An op -> a faster way to run it, made anew for each region, or None where its meaning is all there is."""


def by_meaning(op: Op) -> Fast | None:
    """The planner that leaves every op to its meaning."""
    return None
