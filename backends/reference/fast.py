"""Where faster ways to run an op plug in: what they offer, and how they are asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from moec.backends.reference.frame import Frame
from moec.backends.reference.joined import Experts
from moec.ir import Node


class Fast(Protocol):
    """One op of a region, run in another way than by its meaning; right for every frame its types allow.

    It reads weights from the frame on each call. What it copies out of them it makes in `pack` and nowhere else, and
    puts in place by one assignment: calls may run at the same time.
    """

    @property
    def nbytes_packed(self) -> int:
        """Bytes of the copies of weights that it holds; while there are any, `pack` is called when weights change."""
        ...

    def pack(self, at: Frame) -> None:
        """Make copies anew from the weights in the frame, which has no inputs."""
        ...

    def run(self, at: Frame) -> tuple[Experts, ...]:
        """The op's results for the values in the frame."""
        ...

    def describe(self) -> str:
        """What it does, in a few words."""
        ...


Planner = Callable[[Node, bool], Fast | None]
"""A node and whether copies of weights are allowed -> a faster way to run it, or None where there is none."""


def by_meaning(node: Node, pack: bool) -> Fast | None:
    """The planner that leaves every op to its meaning."""
    return None
