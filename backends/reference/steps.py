"""What a call of a region runs: which ops at all, which of them once, and what can be forgotten on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moec.backends.reference.fast import Fast, Planner
from moec.backends.reference.frame import Frame
from moec.backends.reference.table import MEANINGS
from moec.ir import ConcatWeights, Node, QuantizeWeight, Region, Value, Weight

Planned = Mapping[tuple[Value, ...], Fast | None]
"""The faster way for the node with these results."""


@dataclass(frozen=True)
class Step:
    """One op of a call: how it runs, and the values nobody needs after it."""

    node: Node
    fast: Fast | None
    drop: tuple[str, ...]

    def run(self, at: Frame) -> None:
        """Put the op's results into the frame."""
        results = self.results(at)
        at.values.update((value.name, result) for value, result in zip(self.node.results, results, strict=True))

    def results(self, at: Frame) -> Sequence[Any]:
        """The op's results, which are tensors but for ops of weights."""
        try:
            fast = self.fast
            if fast is not None and at.device.type == fast.device:
                return fast.run(at)
            return MEANINGS[type(self.node.op)](self.node.op, at)
        except Exception as error:
            error.add_note(f"in {self.node}")
            raise


def constant_nodes(region: Region) -> tuple[Node, ...]:
    """The nodes that depend on weights only."""
    known: set[str] = set()
    found = []
    for node in region.nodes:
        if node.op.of_weights and known.issuperset(value.name for value in node.op.operands):
            known.update(value.name for value in node.results)
            if not isinstance(node.op, Weight):
                found.append(node)
    return tuple(found)


def planned(region: Region, constant: tuple[Node, ...], plan: Planner) -> Planned:
    """The faster ways there are. Weights whose sizes are letters are left to the meanings."""
    fixed = {v for node in region.nodes for v in node.results if node in constant or isinstance(node.op, Weight)}
    lettered = {value for value in fixed if value.type.letters}
    return {
        node.results: None if node.op.of_weights or lettered.intersection(node.op.operands) else plan(node.op)
        for node in region.nodes
    }


def computed_once(constant: tuple[Node, ...], region: Region, pack: bool, fast: Planned) -> tuple[Node, ...]:
    """The nodes whose results are held: int8 weights, and with `pack` joined weights that some op's meaning reads."""
    slow = {value for node in region.nodes if fast.get(node.results) is None for value in node.op.operands}
    return tuple(
        node
        for node in constant
        if isinstance(node.op, QuantizeWeight)
        or (pack and isinstance(node.op, ConcatWeights) and not slow.isdisjoint(node.results))
    )


def call_steps(region: Region, once: tuple[Node, ...], fast: Planned) -> tuple[Step, ...]:
    """What a call runs, without what only `once` needs."""
    needed = {value.name for value in region.outputs}
    nodes = []
    for node in reversed(region.nodes):
        wanted = not node.op.of_weights or any(value.name in needed for value in node.results)
        if wanted and node not in once:
            needed |= {value.name for value in node.op.operands}
            if not isinstance(node.op, Weight):
                nodes.append(node)
    kept = {value.name for value in region.outputs}
    steps = []
    for node in nodes:
        drop = {value.name for value in (*node.op.operands, *node.results)} - kept
        kept |= drop
        steps.append(Step(node, fast.get(node.results), tuple(sorted(drop))))
    return tuple(reversed(steps))
