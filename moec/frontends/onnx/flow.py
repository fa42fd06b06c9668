"""How values flow through an ONNX graph: what depends on what, and where all that a node gives comes together again.

Constants flow nowhere: only values that an input of the graph reaches count.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import networkx


class Flow:
    """The nodes of one graph by their place in it, and the edges between them."""

    def __init__(self, graph: Any) -> None:
        self.nodes, self.inputs = list(graph), list(graph.inputs)
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.exit = len(self.nodes)
        self.edges: networkx.DiGraph = networkx.DiGraph()
        self.edges.add_nodes_from(range(self.exit + 1))
        outputs = set(graph.outputs)
        for index, node in enumerate(self.nodes):
            for output in node.outputs:
                users = [self.place[user] for user, _ in output.uses() if user in self.place]
                self.edges.add_edges_from((index, user) for user in users)
                if output in outputs:
                    self.edges.add_edge(index, self.exit)

    @cached_property
    def after(self) -> dict[int, int]:
        """The immediate post-dominator of each node that leads to an output."""
        found: dict[int, int] = networkx.immediate_dominators(self.edges.reverse(copy=False), self.exit)
        return found

    def joins(self, node: Any, most: int = 12) -> list[Any]:
        """Nodes that everything computed from `node` passes through, the nearest first."""
        found: list[Any] = []
        at = self.after.get(self.place[node])
        while at is not None and at != self.exit and len(found) < most:
            found.append(self.nodes[at])
            following = self.after.get(at)
            at = None if following == at else following
        return found

    def before(self, node: Any) -> set[int]:
        """All that a node is computed from, itself included."""
        index = self.place[node]
        return set(networkx.ancestors(self.edges, index)) | {index}

    def behind(self, node: Any) -> set[int]:
        """All that is computed from a node, itself included."""
        index = self.place[node]
        return set(networkx.descendants(self.edges, index)) | {index}

    def region(self, choice: Any, end: Any) -> list[Any]:
        """Nodes that lead to `end` and not to the choice of experts, in order."""
        return [self.nodes[i] for i in sorted(self.before(end) - self.before(choice))]


def constants(nodes: Iterable[Any]) -> list[Any]:
    """The initializers that nodes read, each once, in order of use."""
    found: dict[Any, None] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.const_value is not None:
                found.setdefault(value)
    return list(found)
