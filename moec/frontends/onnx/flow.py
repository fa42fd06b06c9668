"""How values flow through an ONNX graph: what depends on what, and where all that a node gives comes together again.

Constants flow nowhere: only values that an input of the graph reaches count.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import networkx

from moec.frontends.onnx.constants import Constants
from moec.frontends.onnx.graphs import graphs_of


class Flow:
    """The nodes of one graph by their place in it, and the edges between them."""

    def __init__(self, graph: Any, read: Constants) -> None:
        self.nodes, self.inputs = list(graph), list(graph.inputs)
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.exit = len(self.nodes)
        self.fixed = {i for i, node in enumerate(self.nodes) if all(map(read.holds, node.outputs))}
        self._owners = _owners(self.nodes)
        self.edges: networkx.DiGraph = networkx.DiGraph()
        self.edges.add_nodes_from(range(self.exit + 1))
        outputs = set(graph.outputs)
        for index, node in enumerate(self.nodes):
            if index in self.fixed:
                continue
            for output in node.outputs:
                self.edges.add_edges_from((index, user) for user in self._users(output))
                if output in outputs:
                    self.edges.add_edge(index, self.exit)

    def _users(self, value: Any) -> list[int]:
        """Nodes of this graph that read a value, be it in a graph of their own."""
        owners = (self._owners.get(user, user) for user, _ in value.uses())
        return [self.place[user] for user in owners if user in self.place]

    @cached_property
    def after(self) -> dict[int, int]:
        """The immediate post-dominator of each node that leads to an output."""
        found: dict[int, int] = networkx.immediate_dominators(self.edges.reverse(copy=False), self.exit)
        return found

    def joins(self, node: Any, most: int = 24) -> list[Any]:
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


def _owners(nodes: list[Any]) -> dict[Any, Any]:
    """For each node within a node's graphs, that node."""
    found = {}
    for node in nodes:
        for graph in graphs_of(node):
            found.update(dict.fromkeys(graph.all_nodes(), node))
    return found
