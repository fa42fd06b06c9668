"""Graphs that nodes run, as models of their own: the branches of If, the bodies of Loop and Scan.

What such a graph reads of the graphs around it is an input of its model, or a weight where it depends on no input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor

from moec.frontends.onnx.candidates import CHOICES
from moec.frontends.onnx.constants import Constants
from moec.frontends.onnx.dense import PRODUCTS
from moec.frontends.onnx.graphs import forget, graphs_of
from moec.frontends.onnx.layer import Left
from moec.frontends.onnx.moe_ops import DOMAIN, MATRICES

RUN = ("If", "Loop", "Scan")


@dataclass
class Body:
    """A copy of one graph of a node, to be run, read and rewritten alone, and what it was copied from."""

    node: Any
    attribute: str
    model: Any
    around: dict[Any, Any]
    """Its inputs and weights that belong to the graphs around it, and what they are there."""

    @property
    def name(self) -> str:
        return f"the {self.attribute} of {self.node.op_type} {self.node.name or self.node.outputs[0].name}"

    @property
    def own(self) -> list[Any]:
        """The inputs that the node itself gives it, in order: the number of the turn, states, slices."""
        return [value for value in self.model.graph.inputs if value not in self.around]

    @property
    def read(self) -> list[Any]:
        """Values of the graphs around it that change from run to run."""
        return [outer for inner, outer in self.around.items() if inner.const_value is None]


def bodies(model: Any, read: Constants) -> Iterator[Body | Left]:
    """Each graph of a node that may hold a layer; choices within one that nothing is known of, with the reason."""
    for node in list(model.graph):
        for name, graph in _graphs(node):
            if not _may_hold(graph):
                continue
            if node.op_type in RUN and node.domain == "" and name is not None:
                try:
                    yield body_of(model, node, name, graph, read)
                except Exception as error:  # ONNX Runtime's errors, where constants around it are computed
                    why = f"it is in a graph of {node.op_type}, which cannot be taken apart: {str(error)[:160]}"
                    yield from left_within(graph, why)
            else:
                yield from left_within(graph, f"it is in a graph of {node.op_type}, which is not read")


def _graphs(node: Any) -> Iterator[tuple[str | None, Any]]:
    """The graphs of a node with the names of their attributes; None where one holds several."""
    named = {a.name: a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH}
    yield from named.items()
    yield from ((None, graph) for graph in graphs_of(node) if graph not in named.values())


def _may_hold(graph: Any) -> bool:
    nodes = list(graph.all_nodes())
    return any(map(_chooses, nodes)) or sum(node.op_type in PRODUCTS for node in nodes) > 1


def _chooses(node: Any) -> bool:
    return node.op_type in CHOICES or (node.domain == DOMAIN and node.op_type in MATRICES)


def left_within(graph: Any, reason: str) -> Iterator[Left]:
    """Every choice in a graph and in those within it."""
    for one in graph.all_nodes():
        if _chooses(one):
            yield Left(str(one.name or one.outputs[0].name), reason)


def body_of(model: Any, node: Any, attribute: str, graph: Any, read: Constants) -> Body:
    """A copy of a node's graph as a model. The tensors of weights are shared."""
    copy = graph.clone(allow_outer_scope_values=True)
    copy.opset_imports.update(model.opset_imports)
    around: dict[Any, Any] = {}
    for outer in _outside(copy):
        inner = ir.Value(name=outer.name, type=outer.type, shape=outer.shape, const_value=_constant(outer, read))
        around[inner] = outer
        _hand_over(copy, outer, inner)
        if inner.const_value is None:
            copy.inputs.append(inner)
        else:
            inner.shape, inner.type = inner.const_value.shape, ir.TensorType(inner.const_value.dtype)
            copy.register_initializer(inner)
    return Body(node, attribute, ir.Model(copy, ir_version=model.ir_version), around)


def _constant(outer: Any, read: Constants) -> Any:
    if outer.const_value is not None or not read.holds(outer):
        return outer.const_value
    return TorchTensor(read.tensor(outer), name=outer.name)


def _outside(graph: Any) -> list[Any]:
    """Values that nodes of a graph, or of the graphs within it, read of the graphs around it, in order of use."""
    nodes = list(graph.all_nodes())
    known = {value for node in nodes for value in node.outputs}
    for one in (graph, *(inner for node in nodes for inner in graphs_of(node))):
        known.update([*one.inputs, *one.initializers.values()])
    read = (value for node in nodes for value in node.inputs if value is not None)
    return list(dict.fromkeys(value for value in read if value not in known))


def _hand_over(graph: Any, old: Any, new: Any) -> None:
    """Let all nodes in a graph read another value."""
    for node in graph.all_nodes():
        for place, value in enumerate(node.inputs):
            if value is old:
                node.replace_input_with(place, new)


def put_back(body: Body, model: Any) -> None:
    """The copy, as it is now, in the place of what it was copied from; new weights go to the model's graph."""
    old, new = body.node.attributes[body.attribute].as_graph(), body.model.graph
    for inner, outer in body.around.items():
        _hand_over(new, inner, outer)
        if inner in new.inputs:
            new.inputs.remove(inner)
        new.initializers.pop(inner.name, None)
    for value in list(new.initializers.values()):
        if not value.is_graph_output():
            new.initializers.pop(value.name)
            model.graph.register_initializer(value)
    for domain, version in new.opset_imports.items():
        model.graph.opset_imports.setdefault(domain, version)
    body.node.attributes[body.attribute] = ir.AttrGraph(body.attribute, new)
    forget(old)


def name_types(values: Sequence[Any], arrays: Any) -> None:
    """The types of inputs that the file does not state, from what they were in a run."""
    for value in values:
        if value.type is None and value.name in arrays:
            value.type = ir.TensorType(ir.DataType.from_numpy(arrays[value.name].dtype))
