"""The express way through a region that is one fused op: after the first call with inputs of a kind, only kernels.

What a call does besides launching kernels takes longer than the kernels of a small layer, so nothing is done twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from moec.backends.reference.executable import Kept
from moec.backends.reference.steps import Step
from moec.backends.triton.fused import TritonFused
from moec.backends.triton.prepare import Prepared
from moec.ir import ExpertFfn, Region

MOST_KINDS = 4096
"""Kinds of inputs remembered; all are forgotten when there are more."""


class Express:
    """One fused op whose inputs are the region's inputs and whose result is its output."""

    def __init__(self, fused: TritonFused, places: tuple[int, ...]) -> None:
        self._fused, self._places = fused, places
        self._known: set[Hashable] = set()
        # Replaced as one, so that a call never sees the kernels of one state of the weights with another.
        self._state: tuple[Kept, torch.device, Prepared] | None = None

    @classmethod
    def of(cls, region: Region, steps: Sequence[Step]) -> Express | None:
        """The express way of a region, None where it has none."""
        if len(steps) != 1 or not isinstance(steps[0].fast, TritonFused):
            return None
        fused, node = steps[0].fast, steps[0].node
        op = fused.op
        operands = (op.x, op.experts, op.weights) if isinstance(op, ExpertFfn) else (op.x,)
        inputs = [value.name for value in region.inputs]
        results = [value.name for value in node.results]
        straight = [value.name for value in region.outputs] == results and all(v.name in inputs for v in operands)
        flat = op.x.type.rank == 2
        return cls(fused, tuple(inputs.index(v.name) for v in operands)) if straight and flat else None

    def run(
        self, key: tuple[Any, ...], inputs: tuple[torch.Tensor, ...], kept: Kept
    ) -> tuple[torch.Tensor, ...] | None:
        """The region's output; None if inputs of this kind are new, or `kept` is not what the kernels read."""
        state = self._state
        if state is None or state[0] is not kept or key not in self._known or key[0][2] != state[1]:
            return None
        return (state[2](*[inputs[place] for place in self._places]),)

    def learn(self, key: Hashable, device: torch.device, kept: Kept) -> None:
        """After a call by the long way with `kept`: inputs of this kind may come by the express way from now on."""
        prepared = self._fused.prepared_for(device, kept.values)
        if prepared is None:
            return
        if len(self._known) >= MOST_KINDS:
            self._known.clear()
        self._known.add(key)
        self._state = (kept, device, prepared)

    def forget(self) -> None:
        """Let go of the kernels and the weights that they read."""
        self._state = None
