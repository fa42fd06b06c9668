"""The graphs that nodes of a graph run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def graphs_of(node: Any) -> list[Any]:
    """The branches of If, the bodies of Loop and Scan."""
    kinds = [attribute for attribute in node.attributes.values() if attribute.type.name in ("GRAPH", "GRAPHS")]
    return [graph for one in kinds for graph in (one.as_graphs() if one.type.name == "GRAPHS" else [one.as_graph()])]


def with_inner(nodes: Iterable[Any]) -> Iterator[Any]:
    """Nodes, and behind each those of the graphs that it runs, however deep."""
    for node in nodes:
        yield node
        for graph in graphs_of(node):
            yield from graph.all_nodes()


def forget(graph: Any) -> None:
    """Nobody runs it any more: its nodes read nothing, so that nothing is kept for them."""
    for node in list(graph.all_nodes()):
        for place in range(len(node.inputs)):
            node.replace_input_with(place, None)


def forget_unused(model: Any, keep: Sequence[Any] = ()) -> None:
    """Remove nodes that neither an output nor a value of `keep` needs, and the weights that only they read."""
    from onnx_ir.passes import common

    outputs = model.graph.outputs
    count = len(outputs)
    outputs.extend(keep)
    running = {node for node in model.graph.all_nodes() if graphs_of(node)}
    gone = [None]
    while gone:
        common.RemoveUnusedNodesPass()(model)
        gone = [node for node in running if node.graph is None]
        running.difference_update(gone)
        for graph in (graph for node in gone for graph in graphs_of(node)):
            forget(graph)
    del outputs[count:]


def hold_once(model: Any) -> None:
    """Let equal weights be one."""
    known: dict[Any, Any] = {}
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype.name == "STRING" or value.is_graph_input() or value.is_graph_output():
            continue
        key = tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()
        first = known.setdefault(key, value)
        if first is not value:
            value.replace_all_uses_with(first)
            model.graph.initializers.pop(value.name)
