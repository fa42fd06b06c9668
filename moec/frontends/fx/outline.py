"""A closed part of a graph as a module of its own, with the weights it uses under names of their own."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moec.frontends.fx.regions import Part, value_of

# Under this key of a node's meta: a tensor that it gave when the graph ran, where nothing is known of its sizes.
SEEN = "moec_seen"


@dataclass(frozen=True)
class Weight:
    """A tensor that a node of the graph stands for, and its name in the model."""

    name: str
    tensor: torch.Tensor


@dataclass(frozen=True)
class Outlined:
    """The part as a module of one argument; `names` are the nodes of its weights by their names in it."""

    module: fx.GraphModule
    names: Mapping[str, fx.Node]


def outline(part: Part, weights: Mapping[fx.Node, Weight], own: Collection[str], host: nn.Module) -> Outlined:
    """The part as a module; `own` are the names of the layer's weights, whose structure is kept."""
    names = _names(_leaves(part, weights), weights, own)
    graph = fx.Graph()
    x = graph.placeholder("x")
    copies: dict[fx.Node, fx.Node] = {part.x: x}
    for node, size in part.sizes.items():
        copies[node] = product_of(graph, x, size.axes, size.factor)
    root: dict[str, object] = {}
    for name, node in names.items():
        copies[node] = graph.get_attr(name)
        tensor = weights[node].tensor
        root[name] = tensor
    for node in (*_computed(part, weights), *part.inside):
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "call_module":
            root[str(node.target)] = host.get_submodule(str(node.target))
    graph.output(copies[part.y])
    return Outlined(fx.GraphModule(root, graph).eval(), names)


def product_of(graph: fx.Graph, x: fx.Node, axes: Collection[int], factor: int = 1) -> fx.Node:
    """A new node for the product of x's sizes along these axes, times a number."""
    first, *more = [graph.call_function(torch.ops.aten.sym_size.int, (x, axis)) for axis in axes]
    for one in more:
        first = graph.call_function(operator.mul, (first, one))
    return graph.call_function(operator.mul, (first, factor)) if factor != 1 else first


def _leaves(part: Part, weights: Mapping[fx.Node, Weight]) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    todo = list(part.weights)
    while todo:
        node = todo.pop(0)
        if node in weights:
            found[node] = None
        else:
            todo += node.all_input_nodes
    return list(found)


def _computed(part: Part, weights: Mapping[fx.Node, Weight]) -> list[fx.Node]:
    """What is computed from weights alone, in order."""
    found: list[fx.Node] = []

    def visit(node: fx.Node) -> None:
        if node in weights or node in found:
            return
        for one in node.all_input_nodes:
            visit(one)
        found.append(node)

    for node in part.weights:
        visit(node)
    return found


def shared_path(names: Collection[str]) -> tuple[str, ...]:
    """The modules that all these weights lie in, outermost first."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return tuple(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _names(nodes: Collection[fx.Node], weights: Mapping[fx.Node, Weight], own: Collection[str]) -> dict[str, fx.Node]:
    common = len(shared_path(own))
    found: dict[str, fx.Node] = {}
    for node in nodes:
        name = weights[node].name
        inner = ".".join(name.split(".")[common:]) if name in own else "w_" + name.replace(".", "_")
        found[inner if inner not in found else f"{inner}_{len(found)}"] = node
    return found


def example_of(x: fx.Node) -> torch.Tensor | None:
    """Random tokens like x's, where its shape and type are known."""
    known = value_of(x) if value_of(x) is not None else x.meta.get(SEEN)
    if not isinstance(known, torch.Tensor) or not known.is_floating_point():
        return None
    sizes: tuple[Any, ...] = tuple(known.shape)
    shape = [size if type(size) is int else int(size.node.hint or 2) for size in sizes]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(known.dtype).to(known.device)
