"""The express way through a region that is one fused op: after the first call with inputs of a kind, only kernels.

What a call does besides launching kernels takes longer than the kernels of a small layer, so nothing is done twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from moec.backendbase import Weights
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
        # Replaced as one, so that a call never sees kernels of one placement and the number of another.
        self._state: tuple[Hashable, Hashable, torch.device, Prepared] | None = None

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
        self, key: tuple[Any, ...], inputs: tuple[torch.Tensor, ...], weights: Weights
    ) -> tuple[torch.Tensor, ...] | None:
        """The region's output; None if inputs of this kind are new or a weight moved. Raises as `placement`."""
        state = self._state
        if state is None or key not in self._known or key[0][2] != state[2]:
            return None
        placement, version, _, prepared = state
        if placement != weights.placement() or (version is not None and version != weights.version()):
            return None
        return (prepared(*[inputs[place] for place in self._places]),)

    def learn(self, key: Hashable, device: torch.device, placement: Hashable, version: Hashable | None) -> None:
        """After a call by the long way: inputs of this kind may come by the express way from now on.

        `placement` and `version` are those from before that call: what moved meanwhile shows on the next one.
        """
        prepared = self._fused.prepared_for(device)
        if prepared is None:
            return
        if len(self._known) >= MOST_KINDS:
            self._known.clear()
        self._known.add(key)
        self._state = (placement, version, device, prepared)
