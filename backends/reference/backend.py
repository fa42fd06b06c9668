"""The reference back end as the rest of moec sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moec.backendbase import Executable, OpaqueGraph, Weights, check_ops
from moec.backends.reference.executable import RegionExecutable
from moec.backends.reference.fast import Planner, by_meaning
from moec.backends.reference.meanings import run_meanings
from moec.backends.reference.table import MEANINGS
from moec.errors import MoecError, did_you_mean
from moec.ir import Op, Opaque, Region, Weight, verify


class Reference:
    """Runs every op of the op table, on any device.

    `plan` finds faster ways to run an op; without it each runs by its meaning, which all else is tested against.
    """

    name = "reference"

    def __init__(self, plan: Planner = by_meaning) -> None:
        self._plan = plan

    def supports(self, op: Op) -> str | None:
        """None: every op of the op table has a meaning here. An op from elsewhere has none."""
        known = type(op) in MEANINGS or isinstance(op, Weight)
        return None if known else "it has no meaning in moec.backends.reference.table"

    def build(
        self,
        region: Region,
        weights: Weights,
        opaques: Mapping[str, OpaqueGraph],
        *,
        pack: bool = False,
        graphs: bool = False,
    ) -> Executable:
        """The region over these weights. Raises what `verify` raises, MOEC403, MOEC405 and MOEC406.

        It has no CUDA graphs, so `graphs` changes nothing.
        """
        self.check(region, opaques)
        return RegionExecutable(region, weights, opaques, pack=pack, plan=self._plan)

    def differentiable(
        self, region: Region, weights: Weights, inputs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Every op by its meaning, part of the autograd graph of the inputs and of what `weights` hands out."""
        return run_meanings(region, weights, inputs)

    def check(self, region: Region, opaques: Mapping[str, OpaqueGraph]) -> None:
        """Raise unless the region is valid and everything in it is there."""
        verify(region)
        check_ops(self, region)
        for number, node in enumerate(region.nodes, start=2):
            if isinstance(node.op, Opaque) and node.op.graph not in opaques:
                message = f'opaque: no graph is called "{node.op.graph}"'
                raise MoecError(
                    "MOEC406", message, where=f"line {number}: {node}", hint=did_you_mean(node.op.graph, opaques)
                )


def why_not(device: torch.device | None) -> str:
    """Empty: it runs everywhere."""
    return ""


def backend() -> Reference:
    """What `load_backend("reference")` gives."""
    from moec.backends.cpu.plan import plan  # written in terms of this package

    return Reference(plan)
