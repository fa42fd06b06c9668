"""One form for what means the same: no-op and duplicate nodes go, dead code goes, weights stand before their use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from moec.ir import Add, Mul, Node, Op, Region, Value
from moec.passbase import PassLog
from moec.passes.noops import same_value, simpler


@dataclass(frozen=True)
class Canonicalize:
    """Remove no-op, duplicate and unused nodes; put operands and weights into one order.

    Exact: what is left computes the same numbers. Opaque ops are neither merged nor removed nor moved. Running it
    twice changes nothing the second time.
    """

    name: ClassVar[str] = "canonicalize"
    changes_numerics: ClassVar[bool] = False

    def __call__(self, region: Region, log: PassLog) -> Region:
        walk = _Walk(region, log)
        for node in region.nodes:
            walk.visit(node)
        outputs = tuple(walk.now(value) for value in region.outputs)
        nodes = _without_dead(walk.nodes, outputs, log)
        ordered = _weights_before_use(nodes)
        if ordered != nodes:
            log.did("weights moved in front of their first use")
        return replace(region, nodes=ordered, outputs=outputs)


@dataclass
class _Walk:
    """One pass from the first node to the last; operands are already in their final form when a node is reached."""

    region: Region
    log: PassLog
    nodes: list[Node] = field(default_factory=list)
    renamed: dict[Value, Value] = field(default_factory=dict)
    producers: dict[Value, Node] = field(default_factory=dict)
    seen: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    rank: dict[Value, tuple[int, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Weights are going to move, so their place says nothing: they come last, by name.
        weights = {value for node in self.region.nodes if node.op.of_weights for value in node.results}
        for index, value in enumerate(self.region.values):
            self.rank[value] = (1, value.name) if value in weights else (0, index)

    def now(self, value: Value) -> Value:
        return self.renamed.get(value, value)

    def visit(self, node: Node) -> None:
        op = self._simplified(node)
        same = same_value(op, self.producers)
        if same is not None:
            self.renamed[node.results[0]] = same
            self.log.did(f"{node.results[0]}: {op.name} changes nothing; {same} is used instead")
            return
        op = self._ordered(node, op)
        # The repr names every field, so that two constants 0.0 and -0.0, which are equal, stay two.
        key = repr(op)
        if op.pure and key in self.seen:
            for old, new in zip(node.results, self.seen[key], strict=True):
                self.renamed[old] = new
                self.log.did(f"{old}: the same {op.name} as {new}, which is used instead")
            return
        self.seen[key] = node.results
        kept = Node(node.results, op)
        self.nodes.append(kept)
        self.producers.update(dict.fromkeys(node.results, kept))

    def _simplified(self, node: Node) -> Op:
        op = node.op.map_operands(self.now)
        plain = simpler(op)
        if plain != op:
            self.log.did(f"{node.results[0]}: {op.name} without attributes that change nothing")
        return plain

    def _ordered(self, node: Node, op: Op) -> Op:
        """a + b and b + a are the same numbers, bit by bit."""
        if not isinstance(op, Add | Mul) or self.rank[op.a] <= self.rank[op.b]:
            return op
        self.log.did(f"{node.results[0]}: the operands of {op.name} in their usual order")
        return replace(op, a=op.b, b=op.a)


def _without_dead(nodes: list[Node], outputs: tuple[Value, ...], log: PassLog) -> tuple[Node, ...]:
    needed = set(outputs)
    kept: list[Node] = []
    dead: list[str] = []
    for node in reversed(nodes):
        if node.op.pure and needed.isdisjoint(node.results):
            dead.append(f"{', '.join(map(str, node.results))}: {node.op.name} is not used")
            continue
        needed.update(node.op.operands)
        kept.append(node)
    for text in reversed(dead):
        log.did(text)
    return tuple(reversed(kept))


def _weights_before_use(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Nodes of weights only move to just before the node that first needs them, in the order of its operands."""
    of_weights = {value: node for node in nodes if node.op.of_weights for value in node.results}
    ordered: list[Node] = []
    placed: set[Value] = set()

    def place(node: Node) -> None:
        for operand in node.op.operands:
            source = of_weights.get(operand)
            if source is not None and operand not in placed:
                placed.update(source.results)
                place(source)
        ordered.append(node)

    for node in nodes:
        if not node.op.of_weights:
            place(node)
    # A weight that only the region's outputs need has no user to stand before; it keeps its place at the end.
    for node in nodes:
        if node.op.of_weights and placed.isdisjoint(node.results):
            placed.update(node.results)
            place(node)
    return tuple(ordered)
